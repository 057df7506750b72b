"""Mixed second derivatives: of a function by its parameters and by what its model is fed with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..marker import Cutting
from .base import HVPStrategy, LinearMap, Params, ScalarFunction, filled, grad_enabled
from .by_rows import ROWS, Ends
from .graphs import explained
from .parted import Parted
from .reverse import Blockwise
from .through_outputs import Batched

AT_INPUTS = Cutting(at_inputs=True)


class Mixed(HVPStrategy):
    """``d2 f / dx dtheta`` by two backward passes: by rows, which are entries of inputs.

    Parameters
    ----------
    rows
        Makes rows of a parted function; ``rows.none(args)`` says of a batch that it has none, before
        anything is evaluated.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.pushed, self.pulled = Batched(), Batched()

    def linearize(  # type: ignore[override]  # a map each way
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> MixedMap | NothingMap:
        if self._rows.none(args):
            return NothingMap(params)
        with grad_enabled(), explained(self):
            parted = Parted(fn, params, args, cutting=AT_INPUTS)
            ends = self._rows(parted)
            with parted.around():
                return MixedMap(self, parted, ends)


class MixedMap:
    """The mixed derivatives of one batch: ``push`` maps parameters to inputs, ``pull`` the other way."""

    looks, ends, beside = True, None, 0

    def __init__(self, owner: Mixed, parted: Parted, ends: Any) -> None:
        self.rows = ends
        point, leaves = list(parted.point.values()), parted.leaves
        found: tuple[Tensor | None, ...] = (None,) * (len(point) + len(leaves))
        if parted.loss.requires_grad:
            found = torch.autograd.grad(
                parted.loss, [*point, *leaves], create_graph=True, allow_unused=True
            )
        by_point = dict(zip(parted.point, found[: len(point)], strict=True))
        by_input = dict(enumerate(found[len(point) :]))
        self.push: LinearMap = _Push(owner, owner.pushed, parted, ends, by_point)
        self.pull: LinearMap = _Pull(owner, owner.pulled, parted, ends, by_input)

    def verify(self) -> None:
        """As that of a `LinearMap`: made just now, there is nothing to see."""


class NothingMap:
    """A batch without rows."""

    looks, ends, count, beside = False, None, 0, 0

    def __init__(self, params: Params) -> None:
        self.rows = self
        like = next(iter(params.values()))
        self.push: LinearMap = _Zeros({ROWS: like.new_zeros(0)})
        self.pull: LinearMap = _Zeros({n: torch.zeros_like(p) for n, p in params.items()})

    def verify(self) -> None:
        """As that of a `LinearMap`."""


class _Zeros(LinearMap):
    def __init__(self, zeros: Params) -> None:
        self._zeros = {name: t.detach() for name, t in zeros.items()}

    def __call__(self, v: Params) -> Params:
        return self._zeros


class _Half(Blockwise):
    """One direction: the transpose of a gradient's graph."""

    def __init__(
        self,
        owner: Mixed,
        batched: Batched,
        parted: Parted,
        ends: Ends,
        first: Mapping[Any, Tensor | None],
    ) -> None:
        super().__init__(batched, parted.point, parted.args)
        self._owner, self._parted, self._ends = owner, parted, ends
        self._first = {n: g for n, g in first.items() if g is not None and g.requires_grad}

    def _transposed(
        self, ends: list[Tensor], given: dict[Any, Tensor], k: int | None
    ) -> tuple[Tensor | None, ...]:
        if not self._first:
            return (None,) * len(ends)
        around = self._parted.around() if self.looks else nullcontext()
        with grad_enabled(), explained(self._owner), around:
            return torch.autograd.grad(
                list(self._first.values()),
                ends,
                [given[name] for name in self._first],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=k is not None,
            )


class _Push(_Half):
    def _product(self, v: Params, k: int | None = None) -> Params:
        leaves = self._parted.leaves
        found = self._transposed(leaves, v, k)
        lead = () if k is None else (k,)
        full = [
            x.new_zeros(*lead, *x.shape) if t is None else t
            for x, t in zip(leaves, found, strict=True)
        ]
        return {ROWS: self._ends.gather(full, k).detach()}


class _Pull(_Half):
    def _product(self, u: Params, k: int | None = None) -> Params:
        given = dict(enumerate(self._ends.spread(u[ROWS], k)))
        found = self._transposed(list(self._parted.point.values()), given, k)
        return {n: t.detach() for n, t in filled(self._parted.point, found, k).items()}
