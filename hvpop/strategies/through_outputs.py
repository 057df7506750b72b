"""Matrices ``J' B J``: B of the loss in the outputs of its model, J the outputs' Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..marker import AT_MARKS, Cutting
from .authored import NOTHING, authored, ungraded
from .base import HVPStrategy, LinearMap, Params, ScalarFunction, grad_enabled
from .forward import ForwardOverReverse
from .graphs import NoSecondDerivativeError, check_graph, explained
from .parted import Differences, DoublePullBack, Parted, Tensors, pushed_forward
from .referee import generic
from .reverse import Blockwise

Times = Callable[[Tensors, int | None], Tensors]
"""``times(s, k)`` is ``B s``, of one s or of k at once."""

Push = DoublePullBack | Differences

Middle = Callable[[Parted], Times]
"""Makes B of a parted function. One that wants it parted in its own way has ``cutting``, as `Parted`
has; one that has to see something of a function first has ``prove(parted)``."""


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
    def cutting(self) -> Cutting:
        """Where a function is parted."""
        return getattr(self.middle, "cutting", AT_MARKS)

    def pushing(self, parted: Parted) -> Push:
        """``J v``, by the strategy's kind of derivative."""
        if self.strategy.exact:
            return DoublePullBack(parted)
        return Differences(parted, getattr(self.strategy, "step", None))

    def prove(self, parted: Parted) -> None:
        """Let the middle see that the function is what it takes it for."""
        prove = getattr(self.middle, "prove", None)
        if prove is not None and self._tested:
            with parted.around():
                prove(parted)

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
            parted = Parted(fn, params, args, cutting=self.cutting)
            self.prove(parted)
            with ungraded(fn, parted.point), parted.around():
                linear = _Kept(self, parted)
        linear.looks = self._examine(parted, linear.push, params)
        return linear

    def _examine(self, parted: Parted, push: Push, params: Params) -> bool:
        """Whether others wrote of the graph of the outputs; refused where its derivative would be wrong."""
        fn = parted.fn
        if self._known != fn:
            self._known, self._proven, self.batches_columns = fn, NOTHING, None
        found = frozenset().union(*(authored(fn, z) for z in parted.outputs))
        new = found - self._proven
        if new and self._tested and isinstance(push, DoublePullBack):
            check_graph(self, [*parted.outputs, *push.graph])
            self._hold_against_differences(parted, push, params)
            self._proven |= new
        return bool(found)

    def _hold_against_differences(self, parted: Parted, push: Push, params: Params) -> None:
        """Raise if ``J v`` is not that of the outputs, as far as differences can tell."""
        w = generic(params)
        with parted.around(), grad_enabled():
            found, truth = push(w), Differences(parted)(w)
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


class _Kept(Blockwise):
    """Graphs of the outputs, of their pull-back and of the loss, for as long as the map lives."""

    def __init__(self, owner: ThroughOutputs, parted: Parted) -> None:
        super().__init__(owner, parted.point, parted.args)
        self._owner, self.parted = owner, parted
        self._middle = owner.middle(parted)
        self.push = owner.pushing(parted)

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
            parted, tangents = pushed_forward(
                self._fn, self._params, self._args, v, self._owner.cutting
            )
            self._owner.prove(parted)
            with parted.around():
                product = parted.pull(self._owner.middle(parted)(tangents, None), keep=False)
        return {name: t.detach() for name, t in product.items()}


def loss_hessian(parted: Parted) -> Times:
    """The second derivative of the loss in its outputs; one that reaches past them is refused."""
    parted.refuse_beside()
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
