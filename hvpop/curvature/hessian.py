"""The Hessian of an empirical risk as a linear operator."""

from __future__ import annotations

import time
import warnings
from contextlib import closing
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..exchange import guarded
from ..operators import BatchForms, Layout, LinearOperator
from ..operators.base import Memory
from ..risk import SAMPLES, Average, EmpiricalRisk
from ..risk.empirical import Mode
from ..risk.losses import Loss
from ..risk.modules import Selection
from ..strategies import Compiled, FirstThatWorks, HVPStrategy, Params
from ..strategies.base import grad_enabled
from ..strategies.fallback import settled
from .blocks import block
from .check import CheckResult, check
from .diagnosis import culprit
from .forms import batch_forms
from .joining import LiveJoin
from .linearized import LinearizedHessian
from .space import WeightedSum, from_point, in_range, layout_of, multiplier, space_of, to_point
from .tracing import Tracer


class HessianOperator(LinearOperator):
    """The Hessian of a model's average loss over data, with respect to its parameters.

    Follows the live model: each product is of the Hessian at the parameters of that moment, made in
    one pass over the data with the memory of one batch. For many products at one point take
    `linearize` first. Entry ``i`` belongs to the i-th entry of
    ``torch.nn.utils.parameters_to_vector`` of the trainable parameters; `layout` names them.

    Parameters
    ----------
    model, loss, data, mode, average, params, seed
        As in `EmpiricalRisk`.
    strategy : HVPStrategy, optional
        How to differentiate twice. By default reverse-over-reverse, and where an op of the model
        does not allow that, finite differences with a warning. An explicit strategy never falls
        back: it raises.

    Raises
    ------
    ValueError
        For a model without trainable parameters, a loss that is not a scalar or that sums its
        samples under ``average=SAMPLES``, data without batches.
    FloatingPointError
        If a product is not finite; says at which batch, and whether in the vector, loss or gradient.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    >>> data = [(X, torch.zeros(2, 1, dtype=torch.float64))]
    >>> H = HessianOperator(model, torch.nn.MSELoss(), data)
    >>> H
    <2x2 HessianOperator float64 cpu>
    >>> H.to_dense()  # 2 X'X / n
    tensor([[2., 2.],
            [2., 4.]], dtype=torch.float64)
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
        cls, risk: EmpiricalRisk, *, strategy: HVPStrategy | None = None
    ) -> HessianOperator:
        """The Hessian of a risk that was made before."""
        if not isinstance(risk, EmpiricalRisk):
            raise TypeError(
                f"from_risk takes an EmpiricalRisk, got {type(risk).__name__}; for a batch loss make one "
                "with EmpiricalRisk.from_batch_loss(model, batch_loss, data)"
            )
        operator = cls.__new__(cls)
        operator._build(risk, strategy)
        return operator

    def _build(self, risk: EmpiricalRisk, strategy: HVPStrategy | None) -> None:
        if strategy is not None and not isinstance(strategy, HVPStrategy):
            raise TypeError(
                f"strategy must be an HVPStrategy object, got {strategy!r}; "
                "for example strategy=ForwardOverReverse()"
            )
        point = risk.parameters()
        dtype, device = space_of(point)
        self._layout = layout_of(point)
        if dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"the products of a {dtype} model are accurate to two or three digits; "
                "for more, build the operator on a copy of it in float32",
                stacklevel=3,
            )
        n = self.layout.size
        LinearOperator.__init__(self, (n, n), dtype=dtype, device=device, symmetric=True)
        self._passes = self._products = 0
        self._seconds = 0.0
        self.risk = risk
        self.strategy = FirstThatWorks() if strategy is None else strategy
        self._join = LiveJoin(self.risk, self.strategy)
        self._tracer = Tracer()

    @property
    def layout(self) -> Layout:
        return self._layout

    def report(self) -> str:
        """The strategy in use, and what the products have cost so far."""
        return (
            f"{self.strategy!r}: live, nothing kept; {self._products} products, "
            f"passes over the data: {self._passes}, time: {self._seconds:.2f} s"
        )

    def block(self, rows: Selection, cols: Selection = None) -> LinearOperator:
        """The block of some parameters (rows) against others (columns, by default the same).

        Parameters
        ----------
        rows, cols
            As ``params=``: names, globs, modules, a predicate.

        Returns
        -------
        LinearOperator
            Shape ``(entries of rows, entries of cols)``; live, with a true transpose.

        Examples
        --------
        >>> import torch
        >>> from hvpop import HessianOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> H.block("0.*", "1.weight").shape
        (9, 3)
        """
        return block(self, rows, cols)

    def check(self, batches: int | None = 1) -> CheckResult:
        """Examine this operator on its first batches (None: on all of them).

        Looks at determinism, symmetry, agreement with finite differences of ``backward()``
        gradients, agreement of the strategies, parameters without gradient, and layers known to be
        difficult. Raises nothing; costs some forty gradients on those batches.

        Examples
        --------
        >>> import torch
        >>> from hvpop import HessianOperator
        >>> model = torch.nn.Linear(2, 1).double()
        >>> data = [(torch.ones(4, 2).double(), torch.ones(4, 1).double())]
        >>> HessianOperator(model, torch.nn.MSELoss(), data).check().verdict
        'healthy'
        """
        return guarded(lambda: check(self, batches))

    def _label(self) -> str:
        usual = repr(self.strategy) == "ReverseOverReverse()"
        return "HessianOperator" if usual else f"HessianOperator[{self.strategy!r}]"

    def _apply(self, V: Tensor) -> Tensor:
        start = time.perf_counter()
        Y = guarded(lambda: settled(self.strategy, lambda: self._product(V)))
        self._count(V, start)
        return Y

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms:
        start = time.perf_counter()
        forms = guarded(lambda: batch_forms(self, self._risk_as_it_is(), *self._live(), V, batches))
        self._count(V, start)
        return forms

    def _count(self, V: Tensor, start: float) -> None:
        self._passes += 1
        self._products += V.shape[1]
        self._seconds += time.perf_counter() - start

    def _product(self, V: Tensor) -> Tensor:
        point, state = self._live()
        return in_range(lambda V: self._product_at(point, state, V), V, point)

    def _product_at(self, point: Params, state: Params, V: Tensor) -> Tensor:
        columns = to_point(V, self.layout, point)
        multiply = multiplier(columns)
        total = WeightedSum(self.risk.average.normalized)
        risk = self._risk_as_it_is()
        joined = self._join.terms(risk, point, state)
        with grad_enabled(), risk.place(point, state), closing(joined) as terms:
            for term in terms:
                # No name for the map: its graph is gone before the next batch's is built.
                total.add(
                    multiply(self.strategy.linearize(term.function, point, state, *term.data)),
                    term.weight,
                )
        self.risk.refuse()
        Y = from_point(total.result(), V)
        if not isfinite(float(Y.sum())) and not Y.isfinite().all():
            found = culprit(self.risk.terms(), point, state, self.strategy, columns)
            raise FloatingPointError(f"{self!r}: the product is not finite; {found}")
        return Y

    def _linearized(self, memory: Memory, done: dict[int, LinearOperator]) -> LinearOperator:
        if id(self) not in done:
            done[id(self)] = guarded(
                lambda: LinearizedHessian(
                    self.risk, self.strategy, *self._live(), memory, self._tracer
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
        now = layout_of(point)
        if now != self.layout:
            raise RuntimeError(
                f"{self!r}: the model's trainable parameters changed since the operator was built "
                f"(then {len(self.layout.names)} with {self.layout.size} entries, now "
                f"{len(now.names)} with {now.size}); build a new operator"
            )
        return point, self.risk.state()
