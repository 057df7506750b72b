"""A matrix of the model of the moment: each product is one pass over the data, and keeps nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..exchange import guarded
from ..operators import LinearOperator
from ..operators.base import Memory
from ..risk import SAMPLES, Average, EmpiricalRisk
from ..risk.empirical import Mode
from ..risk.losses import Loss
from ..risk.modules import Selection
from ..strategies import Compiled, FirstThatWorks, HVPStrategy, Params, ReverseOverReverse
from ..strategies.base import LinearMap, grad_enabled
from .average import DataAverage, Place
from .joining import LiveJoin
from .linearized import Linearized
from .space import WeightedSum, layout_of, multiplier, require_plain, to_point
from .tracing import Tracer


class Live(DataAverage):
    """A matrix that follows the model, in one pass over the data and the memory of one batch a product.

    Which matrix it is a subclass says, by `_matrix`; the arguments are those of `HessianOperator`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        *,
        strategy: HVPStrategy | None = None,
        mode: Mode = "batch",
        average: Average = SAMPLES,
        params: Selection = None,
        seed: int = 0,
    ) -> None:
        risk = EmpiricalRisk(
            model, loss, data, average=average, mode=mode, params=params, seed=seed
        )
        self._build(risk, strategy)

    @classmethod
    def from_risk(
        cls, risk: EmpiricalRisk, *, strategy: HVPStrategy | None = None, **which: Any
    ) -> Self:
        """The same matrix of a risk that was made before; ``which`` are arguments of its own."""
        if not isinstance(risk, EmpiricalRisk):
            raise TypeError(
                f"from_risk takes an EmpiricalRisk, got {type(risk).__name__}; for a batch loss make one "
                "with EmpiricalRisk.from_batch_loss(model, batch_loss, data)"
            )
        operator = cls.__new__(cls)
        operator._which(**which)
        operator._build(risk, strategy)
        return operator

    def _which(self) -> None:
        """Take the arguments that only this matrix has."""

    def _matrix(self, strategy: HVPStrategy) -> HVPStrategy:
        """What turns a batch's function into its linear map, with derivatives taken by ``strategy``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _matrix(strategy)")

    def _build(self, risk: EmpiricalRisk, strategy: HVPStrategy | None) -> None:
        if strategy is not None and not isinstance(strategy, HVPStrategy):
            raise TypeError(
                f"strategy must be an HVPStrategy object, got {strategy!r}; "
                "for example strategy=ForwardOverReverse()"
            )
        chosen = FirstThatWorks() if strategy is None else strategy
        self._begin(risk, chosen.within(self._matrix))
        if self.torch_dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"the products of a {self.torch_dtype} model are accurate to two or three digits; "
                "for more, build the operator on a copy of it in float32",
                stacklevel=3,
            )

    def _begin(self, risk: EmpiricalRisk, strategy: HVPStrategy) -> None:
        DataAverage.__init__(self, risk, strategy, risk.parameters())
        self._join = LiveJoin(self.risk, self.strategy)
        self._reference = self._matrix(ReverseOverReverse())
        self._tracer = Tracer(self._reference)

    def _kind(self) -> str:
        """Which of several matrices of the name it is, for texts."""
        return ""

    def report(self) -> str:
        """The strategy in use, and what the products have cost so far."""
        return (
            f"{self.strategy!r}: live, nothing kept; {self._products} products, "
            f"passes over the data: {self._passes}, time: {self._seconds:.2f} s"
        )

    def restricted(self, params: Selection) -> Self:
        part = copy.copy(self)
        part._begin(self.risk.restricted(params), self.strategy)
        return part

    def on_shard(self, rank: int, ranks: int) -> Self:
        part = copy.copy(self)
        part._begin(self.risk.on_shard(rank, ranks), self.strategy)
        return part

    def _label(self) -> str:
        usual = repr(self.strategy) == "ReverseOverReverse()"
        name = f"{type(self).__name__}{self._kind()}"
        return name if usual else f"{name}[{self.strategy!r}]"

    def _summed(self, V: Tensor) -> WeightedSum:
        point, state = self._live()
        columns = to_point(V, self.layout, point)
        make: Callable[..., LinearMap] = self.strategy.linearize
        if V.shape[1] == 1 and not self.strategy.of_gradients:
            # Each in memory of its own, or torch would copy what it takes for tangents, batch by batch.
            columns = {name: column.clone() for name, column in columns.items()}
            make = self.strategy.once
        multiply = multiplier(columns)
        total = WeightedSum(self.risk.average.normalized)
        risk = self._risk_as_it_is()
        joined = self._join.terms(risk, point, state)
        with grad_enabled(), risk.place(point, state), closing(joined) as terms:
            for term in terms:
                # No name for the map: its graph is gone before the next batch's is built.
                total.add(multiply(make(term.function, point, state, *term.data)), term.weight)
        self.risk.refuse()
        self._passes += 1
        return total

    def _place(self) -> Place:
        return Place(self._risk_as_it_is(), *self._live())

    def _linearized(self, memory: Memory, done: dict[int, LinearOperator]) -> LinearOperator:
        if id(self) not in done:
            done[id(self)] = guarded(
                lambda: Linearized(
                    type(self).__name__.removesuffix("Operator") + self._kind(),
                    self.risk,
                    self.strategy,
                    self._reference,
                    *self._live(),
                    memory,
                    self._tracer,
                )
            )
        return done[id(self)]

    def _risk_as_it_is(self) -> EmpiricalRisk:
        """The risk; with functions of its own after each change of a setting, if these are traced."""
        traces = isinstance(getattr(self.strategy, "current", self.strategy), Compiled)
        return self.risk.frozen() if traces else self.risk

    def _live(self) -> tuple[Params, Params]:
        """The parameters and all else the loss depends on, as they are now."""
        point = self.risk.parameters()
        require_plain(point)
        now = layout_of(point)
        if now != self.layout:
            raise RuntimeError(
                f"{self!r}: the model's trainable parameters changed since the operator was built "
                f"(then {len(self.layout.names)} with {self.layout.size} entries, now "
                f"{len(now.names)} with {now.size}); build a new operator"
            )
        return point, self.risk.state()
