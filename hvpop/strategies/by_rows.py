"""Rectangular maps: rows that a batch has through the outputs of its model, and their transpose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from .authored import ungraded
from .base import HVPStrategy, LinearMap, Params, ScalarFunction, grad_enabled
from .by_nodes import ByNodes
from .forward import ForwardOverReverse
from .graphs import explained
from .parted import Parted, Tensors, pushed_forward
from .reverse import Blockwise
from .through_outputs import Batched, ThroughOutputs

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
        self._forget_columns()

    def of(self, strategy: HVPStrategy) -> ByRows:
        return ByRows(strategy, self._rows, keeps=self._keeps)

    def linearize(  # type: ignore[override]  # a map each way
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> RowsMap:
        if self._known != fn:
            self._forget_columns()
            self._begin(fn)
        with grad_enabled(), explained(self):
            parted = Parted(fn, params, args, cutting=self.cutting)
            self.prove(parted)
            with ungraded(fn, parted.point), parted.around():
                return RowsMap(self, parted, self._rows(parted), params)

    def _forget_columns(self) -> None:
        self.pushed = Batched(), Batched()  # through the engine, and by nodes
        self.pulled = Batched(), Batched()

    @property
    def keeps(self) -> bool:
        return self._keeps

    def rows(self, parted: Parted) -> Ends:
        return self._rows(parted)


class RowsMap:
    """The rows of one batch: ``push`` maps parameters to rows, ``pull`` rows to parameters."""

    ends = None  # as of a `LinearMap`: graphs are made as they are asked for

    def __init__(self, owner: ByRows, parted: Parted, ends: Ends, params: Params) -> None:
        self._owner, self.parted, self.rows, self._params = owner, parted, ends, params
        self._reading = _Reading(owner, parted)
        self.pull = _Pull(owner, parted, ends, self._reading)
        self.looks = True
        if owner.keeps and not isinstance(owner.strategy, ForwardOverReverse):
            self.looks = self.pull.looks = self.push.looks

    @property
    def beside(self) -> int:
        """As that of a `LinearMap`."""
        nodes = self._reading.nodes
        return 0 if nodes is None else nodes.bytes

    @cached_property
    def push(self) -> LinearMap:
        owner, parted = self._owner, self.parted
        if isinstance(owner.strategy, ForwardOverReverse):
            return _PushForward(owner, parted)
        with grad_enabled(), explained(owner), parted.around():
            nodes = self._reading.nodes
            pushing = owner.pushing(parted) if nodes is None else nodes.push
        push = _Push(owner, parted, self.rows, pushing, nodes)
        push.looks = owner._examine(parted, pushing, self._params)
        return push

    def verify(self) -> None:
        """As that of a `LinearMap`: made just now, there is nothing to see."""


class _Reading:
    """The graph of outputs as it is read, once somebody asks; None where it cannot be."""

    def __init__(self, owner: ByRows, parted: Parted) -> None:
        self._owner, self._parted = owner, parted

    @cached_property
    def nodes(self) -> ByNodes | None:
        return self._owner.read(self._parted, once=not self._owner.keeps)


class _Push(Blockwise):
    def __init__(
        self, owner: ByRows, parted: Parted, ends: Ends, pushing: Any, nodes: ByNodes | None
    ) -> None:
        super().__init__(owner.pushed[nodes is not None], parted.point, parted.args)
        self._owner, self._parted, self._ends = owner, parted, ends
        self._pushing, self._nodes = pushing, nodes

    def _together(self) -> int:
        if self._nodes is not None:
            return self._nodes.width()
        return super()._together() if self._owner.strategy.exact else 1

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
    """The engine's pull-back costs nothing to prepare: what is read serves many products, or columns."""

    def __init__(self, owner: ByRows, parted: Parted, ends: Ends, reading: _Reading) -> None:
        super().__init__(owner.pulled[False], parted.point, parted.args)
        self._owner, self._parted, self._ends, self._reading = owner, parted, ends, reading
        self._nodes: ByNodes | None = None
        if owner.keeps:
            self._read()

    def columns(self, U: Params) -> Params:
        self._read()
        return super().columns(U)

    def _read(self) -> None:
        self._nodes = self._reading.nodes
        self._strategy = self._owner.pulled[self._nodes is not None]

    def _together(self) -> int:
        return super()._together() if self._nodes is None else self._nodes.width()

    def _product(self, u: Params, k: int | None = None) -> Params:
        around = self._parted.around() if self.looks else nullcontext()
        with grad_enabled(), explained(self._owner), around:
            pull = self._parted.pull if self._nodes is None else self._nodes.pull
            found = pull(self._ends.spread(u[ROWS], k), k)
        return {name: t.detach() for name, t in found.items()}
