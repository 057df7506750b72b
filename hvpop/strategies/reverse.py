"""Reverse-over-reverse: ``torch.autograd.grad`` twice, the first time keeping its graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..graph import End, edge, pulled
from .authored import NOTHING, authored, hold_against_differences, refuse_hidden, ungraded
from .base import (
    HVPStrategy,
    LinearMap,
    Params,
    ScalarFunction,
    aligned,
    at,
    filled,
    grad_enabled,
    leaves,
    out_of_memory,
)
from .graphs import check_graph, explained
from .rounding import FLOAT32_TOLERANCE, NOISE, reordered, rounding

BATCHED_NUMEL = {"cpu": 2**15, "cuda": 2**21}
"""Columns are multiplied together where parameters and data have at most this many entries (by
device): there bookkeeping dominates (16 columns of a 64-32-10 network, batch 128: 0.11 instead of
0.29 ms a column; of a small GPT on an H200: 4 instead of 19 ms). Beyond, vectorized kernels lose to
single ones (64-256-10, batch 1024: 6.9 instead of 3.8 ms), and cost memory."""

BLOCK = 16
"""Columns at a time: more gain nothing more, and each costs the memory of a gradient."""


class ReverseOverReverse(HVPStrategy):
    """Differentiate the gradient by backpropagation (Pearlmutter 1994, in its reverse form).

    The broadest strategy: every op with a double backward works. The gradient's graph is built once
    per map; each product is one more backward pass through it. Memory: the graph, for as long as
    the map lives. Columns of small problems go through ``is_grads_batched``, which is compared once
    with a single product; others go one by one.

    Examples
    --------
    >>> import torch
    >>> from hvpop.strategies import ReverseOverReverse
    >>> H = ReverseOverReverse().linearize(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])})
    >>> H({"w": torch.ones(2)})["w"]
    tensor([ 6., 12.])
    """

    def __init__(self) -> None:
        self._known: ScalarFunction | None = None
        self._proven: frozenset[object] = NOTHING  # of what this function passes
        self.batches_columns: bool | None = None
        """Whether columns can be batched, for the function at work; None: not tried yet."""

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        with grad_enabled(), explained(self):
            point = leaves(params, differentiable=differentiable)
            with ungraded(fn, point):
                with at(fn, point, *args):
                    loss = fn(point, *args)
                    gradient: tuple[Tensor | None, ...] = (None,) * len(point)
                    if loss.requires_grad:
                        one = torch.ones_like(loss)
                        gradient = pulled([loss], list(point.values()), [one], create_graph=True)
                refuse_hidden(self, fn, point, loss)
            linear = _DoubleBackward(self, fn, point, gradient, args, differentiable)
        linear.looks = bool(
            self._examine(fn, params, args, linear, [loss, *(g for g in gradient if g is not None)])
        )
        return linear

    def _examine(
        self,
        fn: ScalarFunction,
        params: Params,
        args: tuple[object, ...],
        linear: LinearMap,
        tensors: list[Tensor],
    ) -> frozenset[object]:
        """What others wrote of a graph, refused where its derivative would be wrong."""
        if self._known != fn:
            self._known, self._proven, self.batches_columns = fn, NOTHING, None
        elif not hasattr(fn, "at"):
            return NOTHING  # it cannot be told from what it was: once is enough
        found = authored(fn, tensors[0])
        new = found - self._proven
        if new:
            check_graph(self, tensors)
            hold_against_differences(self, fn, params, args, linear)
            self._proven |= new
        return found


class Untested(ReverseOverReverse):
    """For tracing: there are no numbers to hold against differences."""

    def _examine(self, *args: Any) -> frozenset[object]:
        return NOTHING


class BatchesColumns(Protocol):
    """What knows of a function whether its columns can be batched."""

    batches_columns: bool | None


class Blockwise(LinearMap):
    """Small problems take their columns together, once that has been compared with one by one.

    A subclass implements ``_product(v, k)``, of one vector (k None) or of k at once.
    """

    def __init__(self, strategy: BatchesColumns, point: Params, args: tuple[object, ...]) -> None:
        self._strategy, self._point, self._args = strategy, point, args

    def _product(self, v: Params, k: int | None = None) -> Params:
        raise NotImplementedError

    def __call__(self, v: Params) -> Params:
        return self._product(v)

    def columns(self, V: Params) -> Params:
        width = 1 if self._strategy.batches_columns is False else self._together()
        if width == 1:
            return super().columns(V)
        k = next(iter(V.values())).shape[0]
        blocks = []
        for start in range(0, k, width):
            block = self._batched({name: v[start : start + width] for name, v in V.items()})
            if block is None:
                return super().columns(V)
            blocks.append(block)
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    def _together(self) -> int:
        """How many columns are multiplied at once."""
        given = [*self._point.values(), *pytree.tree_leaves(self._args)]
        tensors = [t for t in given if isinstance(t, Tensor)]
        small = BATCHED_NUMEL.get(tensors[0].device.type, BATCHED_NUMEL["cpu"])
        return BLOCK if sum(t.numel() for t in tensors) <= small else 1

    def _batched(self, V: Params) -> Params | None:
        """Some columns at once; None where an op has no rule for that, or a wrong one."""
        strategy = self._strategy
        k = next(iter(V.values())).shape[0]
        try:
            products = self._product(V, k)
        except Exception as error:  # whatever a batching rule runs into
            if out_of_memory(error):
                raise
            strategy.batches_columns = False
            return None
        if strategy.batches_columns is None:
            single = self({name: v[0] for name, v in V.items()})
            if not all(t.isfinite().all() for t in single.values()):
                return products  # not comparable, and somebody else's to tell
            thirds = {name: v[0] / 3 for name, v in V.items()}
            strategy.batches_columns = _agree(
                {n: p[0] for n, p in products.items()},
                single,
                lambda: {n: 3 * p for n, p in self(thirds).items()},
            )
            if not strategy.batches_columns:
                warnings.warn(
                    f"{strategy!r}: columns are multiplied one by one, because together they gave "
                    "another product",
                    stacklevel=2,
                )
        return products if strategy.batches_columns else None


class _DoubleBackward(Blockwise):
    """The kept graph of a gradient; a product is the transpose of its Jacobian, which is symmetric."""

    def __init__(
        self,
        strategy: ReverseOverReverse,
        fn: ScalarFunction,
        point: Params,
        gradient: tuple[Tensor | None, ...],
        args: tuple[object, ...],
        differentiable: bool,
    ) -> None:
        super().__init__(strategy, point, args)
        self._fn = fn
        self._create_graph = differentiable
        self._views_as_complex = False  # real parameters, as far as a product has shown
        # Parameters that enter linearly have a constant gradient, which has no graph to go through.
        curved = {
            n: g for n, g in zip(point, gradient, strict=True) if g is not None and g.requires_grad
        }
        self._names = list(curved)
        # Edges hold the graph only, not the gradient itself.
        dense = [g.to_dense() if g.is_sparse else g for g in curved.values()]
        self._gradient = [edge(g) for g in dense]

    @property
    def ends(self) -> Sequence[End] | None:  # type: ignore[override]
        return None if self.looks else self._gradient

    def _together(self) -> int:
        return 1 if self._create_graph else super()._together()

    def _product(self, v: Params, k: int | None = None) -> Params:
        return self._pull_back([v[name] for name in self._names], k)

    def _pull_back(self, cotangents: list[Tensor], k: int | None = None) -> Params:
        if not self._gradient:
            return filled(self._point, (None,) * len(self._point), k)
        fn, point, args = self._fn, self._point, self._args
        around = at(fn, point, *args) if self.looks else nullcontext()
        with grad_enabled(), explained(self._strategy), around:
            try:
                products = self._vjp(cotangents, k)
            except RuntimeError as error:
                if self._views_as_complex or "Tensor must have a" not in str(error):
                    raise
                self._views_as_complex = True
                products = self._vjp(cotangents, k)
        return filled(self._point, products, k)

    def _vjp(self, cotangents: list[Tensor], k: int | None) -> tuple[Tensor | None, ...]:
        if self._views_as_complex:
            cotangents = [aligned(v) for v in cotangents]
        return pulled(
            self._gradient,
            list(self._point.values()),
            cotangents,
            create_graph=self._create_graph,
            batched=k is not None,
        )


def _agree(product: Params, truth: Params, again: Callable[[], Params]) -> bool:
    """Equal up to rounding in every entry, on its parameter's scale; a wrong rule shows by more.

    ``again()`` is the truth rounded in another way, for parameters of which nothing else is left.
    """
    tolerance = max(FLOAT32_TOLERANCE, reordered(rounding(truth.values())))
    far = [
        n
        for n, t in truth.items()
        if t.numel() and not _farthest(product[n], t) <= tolerance * float(t.abs().max())
    ]
    if not far:
        return True
    other = again()
    return all(
        _farthest(product[n], truth[n]) <= NOISE * _farthest(other[n], truth[n]) for n in far
    )


def _farthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
