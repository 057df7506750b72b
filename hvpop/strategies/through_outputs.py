"""Matrices ``J' B J``: B of the loss in the outputs of its model, J the outputs' Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from .authored import NOTHING, authored, ungraded
from .base import HVPStrategy, LinearMap, Params, ScalarFunction, grad_enabled
from .forward import ForwardOverReverse
from .graphs import NoSecondDerivativeError, check_graph, explained
from .parted import Differences, DoublePullBack, Parted, Tensors, pushed_forward
from .referee import generic
from .reverse import Blockwise

Middle = Callable[[Parted], Callable[[Tensors, int | None], Tensors]]
"""``middle(parted)(s, k)`` is ``B s``, of one s or of k at once."""


class ThroughOutputs(HVPStrategy):
    """``J' B J`` of a function that marks its outputs, with J by a strategy's kind of derivative.

    J v is the transpose of the pull-back, transposed once more, on kept graphs; by dual numbers with
    `ForwardOverReverse`, by differences with `FiniteDifference`.

    Parameters
    ----------
    strategy
        Says how derivatives are taken.
    middle
        Makes B.
    """

    def __init__(self, strategy: HVPStrategy, middle: Middle) -> None:
        self.strategy, self.middle = strategy, middle
        self.batches_columns: bool | None = None
        self._tested = True
        self._known: ScalarFunction | None = None
        self._proven: frozenset[object] = NOTHING

    def __repr__(self) -> str:
        return repr(self.strategy)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.strategy.exact

    of_gradients = False

    def of(self, strategy: HVPStrategy) -> ThroughOutputs:
        return ThroughOutputs(strategy, self.middle)

    @property
    def untested(self) -> ThroughOutputs:
        """The same where there are no numbers to test with, as in a trace."""
        untested = copy.copy(self)
        untested._tested = False
        return untested

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        if differentiable:
            raise NotImplementedError("products of J' B J are not differentiable")
        if isinstance(self.strategy, ForwardOverReverse):
            return _Forward(self, fn, params, args)
        with grad_enabled(), explained(self):
            parted = Parted(fn, params, args)
            with ungraded(fn, parted.point), parted.around():
                linear = _Kept(self, parted)
        self._examine(linear, params)
        return linear

    def _examine(self, linear: _Kept, params: Params) -> None:
        """What others wrote of the graph of the outputs, refused where its derivative would be wrong."""
        parted, fn = linear.parted, linear.parted.fn
        if self._known != fn:
            self._known, self._proven, self.batches_columns = fn, NOTHING, None
        found = frozenset().union(*(authored(fn, z) for z in parted.outputs))
        linear.looks = bool(found)
        new = found - self._proven
        if new and self._tested and isinstance(linear.push, DoublePullBack):
            check_graph(self, [*parted.outputs, *linear.push.graph])
            self._hold_against_differences(linear, params)
            self._proven |= new

    def _hold_against_differences(self, linear: _Kept, params: Params) -> None:
        """Raise if ``J v`` is not that of the outputs, as far as differences can tell."""
        w = generic(params)
        with linear.parted.around(), grad_enabled():
            found, truth = linear.push(w), Differences(linear.parted)(w)
        off = max(
            (
                float((a - b).norm() / b.norm().clamp_min(1e-30))
                for a, b in zip(found, truth, strict=True)
            ),
            default=0.0,
        )
        if off > 0.03:
            raise NoSecondDerivativeError(
                f"{self!r}: a custom autograd.Function's backward is not the derivative of its forward "
                f"pass, or cannot be transposed: J v is off by {off:.0e} of what differences of outputs "
                "give; strategy=FiniteDifference() needs first derivatives only"
            )


def _middle(owner: ThroughOutputs, parted: Parted) -> Callable[[Tensors, int | None], Tensors]:
    """``B s`` at a point; a loss that reaches parameters past its outputs is refused."""
    beside = parted.beside() if parted.loss.requires_grad else []
    if beside:
        raise ValueError(
            f"the loss reaches {', '.join(beside[:3])} past the outputs of the model, as a penalty "
            "on parameters does, which J' B J does not have in it; leave it out of the loss, and add "
            "its Hessian as an operator: G + HessianOperator(...), or c * Identity.like(G)"
        )
    return owner.middle(parted)


class _Kept(Blockwise):
    """Graphs of the outputs, of their pull-back and of the loss, for as long as the map lives."""

    def __init__(self, owner: ThroughOutputs, parted: Parted) -> None:
        super().__init__(owner, parted.point, parted.args)
        self._owner, self.parted = owner, parted
        self._middle = _middle(owner, parted)
        exact = owner.strategy.exact
        step = getattr(owner.strategy, "step", None)
        self.push = DoublePullBack(parted) if exact else Differences(parted, step)

    def _may_batch(self) -> bool:
        return isinstance(self.push, DoublePullBack) and super()._may_batch()

    def _product(self, v: Params, k: int | None = None) -> Params:
        around = self.parted.around() if self.looks else nullcontext()
        with grad_enabled(), explained(self._owner), around:
            product = self.parted.pull(self._middle(self.push(v, k), k), k)
        return {name: t.detach() for name, t in product.items()}


class _Forward(LinearMap):
    """Nothing kept: the outputs with their tangents, and one pass back."""

    def __init__(
        self, owner: ThroughOutputs, fn: ScalarFunction, params: Params, args: tuple[object, ...]
    ) -> None:
        self._owner, self._fn, self._params, self._args = owner, fn, params, args

    def __call__(self, v: Params) -> Params:
        with grad_enabled(), explained(self._owner):
            parted, tangents = pushed_forward(self._fn, self._params, self._args, v)
            with parted.around():
                product = parted.pull(_middle(self._owner, parted)(tangents, None), keep=False)
        return {name: t.detach() for name, t in product.items()}


def loss_hessian(parted: Parted) -> Callable[[Tensors, int | None], Tensors]:
    """The second derivative of the loss in its outputs."""
    places = parted.leaves
    first: tuple[Tensor | None, ...] = (None,) * len(places)
    if parted.loss.requires_grad:
        first = torch.autograd.grad(parted.loss, places, create_graph=True, allow_unused=True)
    curved = [i for i, g in enumerate(first) if g is not None and g.requires_grad]
    gradient = [g for g in first if g is not None and g.requires_grad]

    def times(s: Tensors, k: int | None) -> Tensors:
        found: tuple[Tensor | None, ...] = (None,) * len(places)
        if gradient:
            found = torch.autograd.grad(
                gradient,
                places,
                [s[i] for i in curved],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=k is not None,
            )
        return [torch.zeros_like(t) if f is None else f for f, t in zip(found, s, strict=True)]

    return times
