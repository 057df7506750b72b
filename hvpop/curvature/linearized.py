"""A matrix frozen at one point and made ready for many products."""

from __future__ import annotations

import copy
import time
import warnings
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor

from ..exchange import guarded
from ..operators.base import Memory
from ..risk import EmpiricalRisk
from ..risk.merging import concatenated, stacked
from ..risk.modules import Selection
from ..risk.outside import Outside
from ..strategies import FirstThatWorks, HVPStrategy, NoSecondDerivativeError, Params
from ..strategies.base import grad_enabled, out_of_memory
from ..strategies.fallback import settled
from ..strategies.rounding import FLOAT32_TOLERANCE, agree, nudged, reordered
from .average import DataAverage, Place
from .formed import FORM_AFTER
from .joining import random_direction, run_as_one, same
from .memory import budget_in_bytes, graph_rounding
from .preparation import Preparation
from .space import WeightedSum, columns_in, multiplier, to_point
from .tracing import TRACE_AFTER, Tracer, may_trace


@dataclass(frozen=True)
class Report:
    """What a linearized operator keeps, and what it has cost so far."""

    strategy: str
    batches: int  # of the data, as far as a pass has shown
    kept: int  # batches whose maps are kept
    parts: int  # functions that the batches are run as
    bytes: int  # of all that is kept: the point, buffers, batches that nobody else holds, maps
    budget: int
    passes: int  # over the data as the user gave it
    products: int
    seconds: float

    def __str__(self) -> str:
        joined = f" run as {self.parts}" if self.parts < self.batches else ""
        return (
            f"{self.strategy}: {self.batches} batches{joined}, maps of {self.kept} kept in "
            f"{_mebibytes(self.bytes)} of {_mebibytes(self.budget)} MiB; {self.products} products, "
            f"passes over the data: {self.passes}, time: {self.seconds:.2f} s"
        )


def _mebibytes(count: int) -> str:
    mebibytes = count / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 100 else f"{mebibytes:.3g}"


class Linearized(DataAverage):
    """The matrix as it was when ``linearize`` of a `HessianOperator` or its like was called.

    Made by that method. Parameters, buffers and train or eval mode are those of that moment. The
    first product reads the data once and prepares: batches are held, small ones are run as one,
    and what does not depend on the vector is computed once and kept, as far as the budget allows;
    what does not fit is computed again for each product. After a few products of a second moment of
    gradients the gradients themselves are kept where they are smaller than that. After some thousand products of a model of
    ordinary layers the maps are traced, as by `Compiled` without its compiler.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> A = HessianOperator(model, torch.nn.MSELoss(), data).linearize(memory="1MiB")
    >>> A @ torch.tensor([1.0, 2.0])
    tensor([1., 2.])
    >>> A.is_current()
    True
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> A.is_current()
    False
    """

    def __init__(
        self,
        name: str,
        risk: EmpiricalRisk,
        strategy: HVPStrategy,
        reference: HVPStrategy,
        point: Params,
        state: Params,
        memory: Memory,
        tracer: Tracer,
    ) -> None:
        super().__init__(risk.frozen(), strategy, point)
        self._name, self._reference = name, reference
        self._budget = budget_in_bytes(memory, self.device)
        self._live_risk = risk
        self._fingerprint = risk.fingerprint()
        self._tracer = tracer
        self._outside: Outside | None = self.risk.outside()
        self._loss: float | None = None  # of the first batch, where products evaluate it again
        with torch.inference_mode(False):
            self._point = {n: p.detach().clone().requires_grad_() for n, p in point.items()}
            self._state = {name: t.detach().clone() for name, t in state.items()}
        self._preparation: Preparation | None = None

    def _label(self) -> str:
        return f"Linearized{self._name}"

    def _place(self) -> Place:
        self._refuse_another_matrix()
        return Place(self.risk, self._point, self._state)

    def restricted(self, params: Selection) -> Linearized:
        """The same matrix of some of the parameters, at the same point."""
        part = copy.copy(self)
        part._preparation = None
        part.risk = self.risk.restricted(params)
        point = {name: self._point[name] for name in part.risk.parameters()}
        others = {name: p.detach() for name, p in self._point.items() if name not in point}
        DataAverage.__init__(part, part.risk, self.strategy.within(lambda one: one), point)
        part._point, part._state = point, self._state | others
        return part

    def strategies_left(self, count: int | None = None) -> int:
        if count is not None:
            self._preparation = None  # its maps are those of the strategy that failed
        return super().strategies_left(count)

    def _uses(self, count: int | None = None) -> int:
        if count is not None:
            self._products = count
            prepared = self._preparation
            if prepared is not None and (
                (count < TRACE_AFTER and prepared.traced)
                or (count < FORM_AFTER and prepared.formed)
            ):
                self._preparation = None
        return self._products

    def __getstate__(self) -> dict[str, Any]:
        # Graphs can be neither copied nor pickled; a copy prepares anew. SciPy has state of its own.
        state: dict[str, Any] = super().__getstate__()
        return state | {"_preparation": None, "_outside": None, "_loss": None}

    def is_current(self) -> bool:
        return self._live_risk.fingerprint() == self._fingerprint

    def report(self) -> Report:
        """What is kept, and what the products have cost. Prepares if no product was made yet."""
        start = time.perf_counter()
        prepared = guarded(self._prepared)
        self._seconds += time.perf_counter() - start
        return Report(
            strategy=repr(self.strategy)
            + (", traced" if prepared.traced else "")
            + (", rows formed" if prepared.formed else ""),
            batches=prepared.batches,
            kept=sum(part.batches for part in prepared.parts if part.map is not None),
            parts=len(prepared.parts) + prepared.batches - len(prepared.terms),
            bytes=prepared.bytes,
            budget=self._budget,
            passes=self._passes,
            products=self._products,
            seconds=self._seconds,
        )

    def _summed(self, V: Tensor) -> WeightedSum:
        prepared = self._prepared()
        if not prepared.is_self_contained():
            self._refuse_another_matrix()
            prepared.refuse_written()
        else:
            prepared.refuse_shared()
        self._exchange_when_used(prepared)
        columns = to_point(V, self.layout, self._point)
        with grad_enabled(), self._around():
            return self._attempt(columns)

    def _refuse_another_matrix(self) -> None:
        """Raise if evaluating again would be of another loss, by what no snapshot puts back.

        What evaluations change themselves (counters, caches) leaves the loss as it was.
        """
        if self._outside is None:
            self._outside = self.risk.outside()
        name = self._outside.changed(but_grown=self._loss is None)
        if name is None:
            return
        if self._loss is None or not isclose(self._loss, self._first_loss(), rel_tol=_SAME):
            raise RuntimeError(_ANOTHER.format(self, name))
        self._outside = self.risk.outside()

    def _first_loss(self) -> float:
        with (
            grad_enabled(),
            self.risk.place(self._point, self._state),
            closing(self.risk.terms()) as terms,
        ):
            term = next(terms)
            return float(term.function(self._point, self._state, *term.data).detach())

    def _around(self) -> AbstractContextManager[None]:
        """The model at the point, if a product may look at it."""
        prepared = self._preparation
        if prepared is not None and prepared.is_self_contained():
            return nullcontext()
        return self.risk.place(self._point, self._state)

    def _exchange_when_used(self, prepared: Preparation) -> None:
        """Exchange the kept maps for formed or traced ones, once, when they have been used much."""
        if not prepared.tried_forming and self._products >= FORM_AFTER:
            with grad_enabled(), self.risk.place(self._point, self._state):
                prepared.form()
        if prepared.tried_tracing or self._products < TRACE_AFTER:
            return
        if may_trace(self.strategy, self.risk):
            with grad_enabled(), self.risk.place(self._point, self._state):
                prepared.trace(self._tracer)

    def _attempt(self, columns: Params) -> WeightedSum:
        prepared = self._prepared()
        while True:
            try:
                return self._product(prepared, columns)
            except NoSecondDerivativeError:
                prepared.refuse_written()
                self._preparation = None  # its maps are those of the strategy that failed
                raise
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if not prepared.release() and not prepared.narrow(columns_in(columns)):
                    raise

    def _product(self, prepared: Preparation, columns: Params) -> WeightedSum:
        multiply = multiplier(columns)
        width = prepared.columns_at_once() if columns_in(columns) > 1 else 1
        total = WeightedSum(self.risk.average.normalized)
        for part in prepared.parts:
            # No name for a map made here: its graph is gone before the next one is built.
            term = part.term
            total.add(multiply(part.map or prepared.linearized(term), width), term.weight)
        for term in prepared.rest():
            total.add(multiply(prepared.linearized(term), width), term.weight)
        self.risk.refuse()
        self._passes += not prepared.complete
        return total

    def _prepared(self) -> Preparation:
        if self._preparation is None:
            self._refuse_another_matrix()
            with grad_enabled(), self.risk.place(self._point, self._state):
                self._preparation = settled(self.strategy, self._prepare)
            self._passes += 1
            if self._outside and self._loss is None and not self._preparation.is_self_contained():
                self._loss = self._first_loss()
                self._outside = self.risk.outside()
        return self._preparation

    def _prepare(self) -> Preparation:
        """Run batches as one in the first way that gives the product of batches run one by one."""
        prepared = Preparation(self.risk, self.strategy, self._point, self._state, self._budget)
        exact = getattr(self.strategy, "current", self.strategy).exact
        joins = prepared.joins() if exact else []
        if concatenated in joins and self.risk.plain:
            pair = prepared.pair(concatenated)  # of ordinary layers two batches tell of all
            if run_as_one(self.strategy, pair, self._point, self._state, self.risk.seed):
                prepared.build(concatenated)
                return prepared
        if joins:
            probe = random_direction(self._point, self.risk.seed)
            truth = self._truth(prepared, probe, self._point)
            self.risk.refuse()
            if not truth or not all(bool(t.isfinite().all()) for t in truth):
                joins = []  # nothing to compare with; the product will say why

        def again() -> list[Tensor]:
            return self._truth(prepared, probe, nudged(self._point))

        for join in joins:
            with suppress(Exception):  # batches that do not fit together, ops that vmap cannot do
                prepared.build(join)
                product = self._product(prepared, probe).result()
                if same(product, truth, self._point, again):
                    return prepared
                # Concatenation may be wrong, where samples see each other; stacking may not.
                if join is stacked and not agree(product, truth, self._rounding(prepared), again):
                    warnings.warn(_DISAGREES.format(self), stacklevel=2)
        prepared.build(None)
        return prepared

    def _rounding(self, prepared: Preparation) -> float:
        """What rounding inside the model explains of a difference between products, relative."""
        eps = 0.0
        with suppress(RuntimeError):  # functions that saved-tensor hooks cannot look into
            eps = graph_rounding(lambda: prepared.linearized(prepared.terms[0]))
        return max(FLOAT32_TOLERANCE, reordered(eps))

    def _truth(self, prepared: Preparation, probe: Params, point: Params) -> list[Tensor]:
        """A product by the default strategy, batch by batch; empty if that cannot do it."""
        chosen = self.strategy if isinstance(self.strategy, FirstThatWorks) else None
        reference = chosen or self._reference
        multiply = multiplier(probe)
        total = WeightedSum(self.risk.average.normalized)
        try:
            for term in prepared.terms:
                total.add(
                    multiply(reference.linearize(term.function, point, self._state, *term.data)),
                    term.weight,
                )
        except NoSecondDerivativeError:
            if chosen is not None:
                raise  # the chain steps down, and preparation starts again
            return []
        return total.result()


_SAME = 1e-5
"""Losses relatively nearer than this are of the same function: rounding differs from run to run."""

_ANOTHER = (
    "{!r}: {} has changed since linearize() was called, which is part of no module and cannot be put "
    "back, so that evaluating the loss again would be of another matrix; call linearize() again (one "
    "with strategy=None and the memory to keep its maps evaluates it once, for the first product)"
)
_DISAGREES = (
    "{!r}: batches are run one by one, because vectorized over they gave another product than by "
    "themselves"
)
