"""Rectangular maps: rows that a batch has through the outputs of its model, and their transpose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from .authored import ungraded
from .base import HVPStrategy, LinearMap, Params, ScalarFunction, grad_enabled
from .forward import ForwardOverReverse
from .graphs import explained
from .parted import Parted, Tensors, pushed_forward
from .reverse import Blockwise
from .through_outputs import ThroughOutputs

ROWS = ""
"""The name of what stands for rows where maps take and give dicts."""


class Ends(Protocol):
    """Rows in the outputs of a parted function: ``gather`` multiplies by them, ``spread`` is its transpose."""

    count: int

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor: ...

    def spread(self, u: Tensor, k: int | None = None) -> Tensors: ...


class ByRows(ThroughOutputs):
    """Rows ``R J`` of a function that marks its outputs: products by J, pull-backs of R's transpose.

    Parameters
    ----------
    strategy
        Says how J v is made, as for `ThroughOutputs`.
    rows
        Makes R of a parted function.
    keeps
        Whether a map is to be used much: then what J v needs is made at once, and kept.
    """

    def __init__(
        self, strategy: HVPStrategy, rows: Callable[[Parted], Ends], *, keeps: bool
    ) -> None:
        super().__init__(strategy, rows)  # type: ignore[arg-type]  # no middle, but parted like one
        self._rows, self._keeps = rows, keeps
        self.pushed, self.pulled = Batched(), Batched()

    def of(self, strategy: HVPStrategy) -> ByRows:
        return ByRows(strategy, self._rows, keeps=self._keeps)

    def linearize(  # type: ignore[override]  # a map each way
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> RowsMap:
        if self._known != fn:
            self.pushed, self.pulled = Batched(), Batched()
            self._begin(fn)
        with grad_enabled(), explained(self):
            parted = Parted(fn, params, args, cutting=self.cutting)
            self.prove(parted)
            with ungraded(fn, parted.point), parted.around():
                return RowsMap(self, parted, self._rows(parted), params)

    @property
    def keeps(self) -> bool:
        return self._keeps

    def rows(self, parted: Parted) -> Ends:
        return self._rows(parted)


class Batched:
    """Whether columns can be multiplied at once; None: not tried yet."""

    batches_columns: bool | None = None


class RowsMap:
    """The rows of one batch: ``push`` maps parameters to rows, ``pull`` rows to parameters."""

    ends = None  # as of a `LinearMap`: graphs are made as they are asked for

    def __init__(self, owner: ByRows, parted: Parted, ends: Ends, params: Params) -> None:
        self._owner, self.parted, self.rows, self._params = owner, parted, ends, params
        self.pull = _Pull(owner, parted, ends)
        self.looks = True
        if owner.keeps and not isinstance(owner.strategy, ForwardOverReverse):
            self.looks = self.pull.looks = self.push.looks

    @cached_property
    def push(self) -> LinearMap:
        owner, parted = self._owner, self.parted
        if isinstance(owner.strategy, ForwardOverReverse):
            return _PushForward(owner, parted)
        with grad_enabled(), explained(owner), parted.around():
            pushing = owner.pushing(parted)
        push = _Push(owner, parted, self.rows, pushing)
        push.looks = owner._examine(parted, pushing, self._params)
        return push

    def verify(self) -> None:
        """As that of a `LinearMap`: made just now, there is nothing to see."""


class _Push(Blockwise):
    def __init__(self, owner: ByRows, parted: Parted, ends: Ends, pushing: Any) -> None:
        super().__init__(owner.pushed, parted.point, parted.args)
        self._owner, self._parted, self._ends, self._pushing = owner, parted, ends, pushing

    def _may_batch(self) -> bool:
        return self._owner.strategy.exact and super()._may_batch()

    def _product(self, v: Params, k: int | None = None) -> Params:
        around = self._parted.around() if self.looks else nullcontext()
        with grad_enabled(), explained(self._owner), around:
            return {ROWS: self._ends.gather(self._pushing(v, k), k).detach()}


class _PushForward(LinearMap):
    def __init__(self, owner: ByRows, parted: Parted) -> None:
        self._owner, self._parted = owner, parted

    def __call__(self, v: Params) -> Params:
        old, owner = self._parted, self._owner
        with grad_enabled(), explained(owner):
            parted, tangents = pushed_forward(old.fn, old.point, old.args, v, owner.cutting)
            owner.passed(parted)
            with parted.around():
                return {ROWS: owner.rows(parted).gather(tangents).detach()}


class _Pull(Blockwise):
    def __init__(self, owner: ByRows, parted: Parted, ends: Ends) -> None:
        super().__init__(owner.pulled, parted.point, parted.args)
        self._owner, self._parted, self._ends = owner, parted, ends

    def _product(self, u: Params, k: int | None = None) -> Params:
        around = self._parted.around() if self.looks else nullcontext()
        with grad_enabled(), explained(self._owner), around:
            found = self._parted.pull(self._ends.spread(u[ROWS], k), k)
        return {name: t.detach() for name, t in found.items()}
