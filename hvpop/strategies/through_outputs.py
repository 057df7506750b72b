"""Matrices ``J' B J``: B of the loss in the outputs of its model, J the outputs' Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..graph import leaves_of, nodes_of, pulled
from ..marker import AT_MARKS, Cutting
from .authored import NOTHING, authored, ungraded
from .base import HVPStrategy, LinearMap, Params, ScalarFunction, grad_enabled, out_of_memory
from .by_nodes import ByNodes
from .forward import ForwardOverReverse
from .graphs import NoSecondDerivativeError, check_graph, explained
from .nodes import UnreadableError
from .parted import Differences, DoublePullBack, Parted, Tensors, pushed_forward
from .referee import generic, norm
from .reverse import Blockwise, ReverseOverReverse
from .rounding import agree, nudged, reordered, rounding

Times = Callable[[Tensors, int | None], Tensors]
"""``times(s, k)`` is ``B s``, of one s or of k at once."""

Push = Callable[..., Tensors]

Middle = Callable[[Parted], Times]
"""Makes B of a parted function. One that wants it parted in its own way has ``cutting``, as `Parted`
has; one that has to see something of a function first has ``prove(parted)``."""


class Batched:
    """Whether columns can be multiplied at once; None: not tried yet."""

    batches_columns: bool | None = None


class ThroughOutputs(HVPStrategy):
    """``J' B J`` of a function that marks its outputs, with J by a strategy's kind of derivative.

    J v is the transpose of the pull-back, transposed once more, on kept graphs; by dual numbers with
    `ForwardOverReverse`, by differences with `FiniteDifference`. Of ordinary layers whose ops are all
    known it is read off the graph (`ByNodes`), and else a single product is made by dual numbers, each
    once it has been seen to give the same for all ops of the function.

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
        self._pushed: frozenset[object] = NOTHING  # ops through which dual numbers are right
        self._attempts = 0  # at seeing so; none is left where they have been wrong
        self._read: frozenset[str] = frozenset()  # nodes that are right as they are read
        self._readings = 0  # attempts at seeing so
        self.by_nodes = Batched()

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
            self._begin(fn)
            return _Forward(self, fn, params, args)
        with grad_enabled(), explained(self):
            parted = Parted(fn, params, args, cutting=self.cutting)
            self.prove(parted)
            with ungraded(fn, parted.point), parted.around():
                linear = KeptGraphs(self, parted)
        linear.looks = self._examine(parted, linear.push, params)
        return linear

    def once(self, fn: ScalarFunction, params: Params, *args: object) -> LinearMap:
        if not self._tested or type(self.strategy) is not ReverseOverReverse:
            return self.linearize(fn, params, *args)
        return _Once(self, fn, params, args)

    def _begin(self, fn: ScalarFunction) -> None:
        """Forget what was seen of another function."""
        if self._known != fn:
            self._known, self._proven, self.batches_columns = fn, NOTHING, None
            self._pushed, self._attempts = NOTHING, 0
            self._read, self._readings, self.by_nodes = frozenset(), 0, Batched()

    def read(self, parted: Parted, *, once: bool = False) -> ByNodes | None:
        """The outputs' graph node by node, of known ops that have been seen to be right so."""
        self._begin(parted.fn)
        if type(self.strategy) is not ReverseOverReverse or not self._tested:
            return None
        if self._readings >= ATTEMPTS:
            return None
        if any(authored(parted.fn, z) for z in parted.outputs):
            return None  # custom Functions, and hooks
        try:
            nodes = ByNodes(parted.outputs, parted.point, once=once)
        except UnreadableError:
            return None
        if not nodes.kinds <= self._read:
            right = _reads_right(nodes, parted)
            self._readings += ATTEMPTS if right is False else right is None
            if not right:
                return None
            self._read |= nodes.kinds
        return nodes

    def _examine(self, parted: Parted, push: Push, params: Params) -> bool:
        """Whether others wrote of the graph of the outputs; refused where its derivative would be wrong."""
        fn = parted.fn
        self._begin(fn)
        found = frozenset().union(*(authored(fn, z) for z in parted.outputs))
        new = found - self._proven
        if new and self._tested:
            if isinstance(push, DoublePullBack):
                check_graph(self, [*parted.outputs, *push.graph])
            self._hold_against_differences(parted, push, params)
            self._proven |= new
        return bool(found)

    def passed(self, parted: Parted) -> frozenset[object]:
        """The ops that dual numbers went through; those of a strategy that takes no others are tried."""
        ops = frozenset(node.name() for node in nodes_of(parted.outputs)).union(
            *(authored(parted.fn, z) for z in parted.outputs)
        )
        if (
            isinstance(self.strategy, ForwardOverReverse)
            and self._tested
            and not ops <= self._pushed
        ):
            w = generic(parted.point)
            tried, tangents = pushed_forward(parted.fn, parted.point, parted.args, w, self.cutting)
            with tried.around():
                if not is_transpose(tried, tangents, w):
                    raise NoSecondDerivativeError(f"{self!r}: {_NO_TRANSPOSE}")
            self._pushed |= ops
        return ops

    def _hold_against_differences(self, parted: Parted, push: Push, params: Params) -> None:
        """Raise if ``J v`` is not that of the outputs, as far as differences can tell.

        A straight-through estimator has its J by its author's will, and is differentiated as it is
        written: what is pulled back is the transpose of that, and not of what differences give.
        """
        w, differs = generic(params), isinstance(push, Differences)
        with parted.around(), grad_enabled():
            found = push(w)
            truth = found if differs else Differences(parted)(w)
            right = is_transpose(parted, truth, w, COARSE)
            written = not differs and is_transpose(parted, found, w)
        pairs = [(a.double(), b.double()) for a, b in zip(found, truth, strict=True)]
        off = max(
            (float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs), default=0.0
        )
        if right and off > COARSE:
            raise NoSecondDerivativeError(
                f"{self!r}: a custom autograd.Function's backward cannot be transposed: J v is off by "
                f"{off:.0e} of what differences of outputs give; strategy=FiniteDifference() needs first "
                "derivatives only"
            )
        if not right and not written:
            raise NoSecondDerivativeError(f"{self!r}: {_NO_TRANSPOSE}")


def _reads_right(nodes: ByNodes, parted: Parted) -> bool | None:
    """Whether what is read gives what the engine gives; None where that was zero, which tells nothing.

    Each parameter is compared by itself on the way back, and moves the outputs as much as any other on
    the way there.
    """
    tolerance = reordered(rounding(parted.point.values()))
    with parted.around():
        s = list(generic({str(i): z.detach() for i, z in enumerate(parted.outputs)}).values())
        back = parted.pull(s)
        sizes = {name: float(g.norm()) for name, g in back.items()}
        if not all(sizes[name] for name in nodes.reached):
            return None
        v = {name: t / (sizes[name] or 1.0) for name, t in generic(parted.point).items()}
        there = DoublePullBack(parted)
        return agree(
            [*nodes.pull(s).values(), *nodes.push(v)],
            [*back.values(), *there(v)],
            tolerance,
            lambda: [
                *(3 * t for t in parted.pull([t / 3 for t in s]).values()),
                *(3 * t for t in there({name: t / 3 for name, t in v.items()})),
            ],
        )


COARSE = 0.03
"""What differences may be off by."""

_NO_TRANSPOSE = (
    "what is pulled back through the model is not the transpose of J v, as where a custom autograd.Function "
    "or a hook on a tensor changes gradients; a straight-through estimator is x + (f(x) - x).detach() for "
    "every strategy, and ReverseOverReverse() takes others as they are written, if they are linear"
)


def is_transpose(
    parted: Parted, tangents: Tensors, w: Params, tolerance: float | None = None
) -> bool:
    """Whether pull-backs are the transpose of what gave ``tangents`` along ``w``, as a few show."""
    tolerance = reordered(rounding([*tangents, *w.values()])) if tolerance is None else tolerance
    named = {str(i): t.detach().double() for i, t in enumerate(tangents)}
    for seed in range(3):
        s = generic(named, seed=seed)
        found = parted.pull([t.to(z) for t, z in zip(s.values(), parted.outputs, strict=True)])
        ahead = sum(float((s[i] * t).sum()) for i, t in named.items())
        back = sum(
            float((g.detach().double() * w[name].double()).sum()) for name, g in found.items()
        )
        if not abs(ahead - back) <= tolerance * norm(named):
            return False
    return True


class KeptGraphs(Blockwise):
    """Graphs of the outputs, of their pull-back and of the loss, for as long as the map lives."""

    def __init__(self, owner: ThroughOutputs, parted: Parted) -> None:
        nodes = self._nodes = owner.read(parted)
        super().__init__(owner if nodes is None else owner.by_nodes, parted.point, parted.args)
        self._owner, self.parted = owner, parted
        self.middle = owner.middle(parted)
        self.push: Push = owner.pushing(parted) if nodes is None else nodes.push
        self._pull = parted.pull if nodes is None else nodes.pull
        if nodes is not None:
            self.bare, self.beside = not nodes.alone, nodes.bytes

    def _together(self) -> int:
        if self._nodes is not None:
            return self._nodes.width()
        return super()._together() if isinstance(self.push, DoublePullBack) else 1

    def _product(self, v: Params, k: int | None = None) -> Params:
        around = self.parted.around() if self.looks else nullcontext()
        with grad_enabled(), explained(self._owner), around:
            product = self._pull(self.middle(self.push(v, k), k), k)
        return {name: t.detach() for name, t in product.items()}


class _Forward(LinearMap):
    """Nothing kept: the outputs with their tangents, and one pass back."""

    def __init__(
        self, owner: ThroughOutputs, fn: ScalarFunction, params: Params, args: tuple[object, ...]
    ) -> None:
        self._owner, self._fn, self._params, self._args = owner, fn, params, args
        self.passed: frozenset[object] = NOTHING  # the ops of the outputs in the last product

    def __call__(self, v: Params) -> Params:
        with grad_enabled(), explained(self._owner):
            parted, tangents = pushed_forward(
                self._fn, self._params, self._args, v, self._owner.cutting
            )
            self.passed = self._owner.passed(parted)
            self._owner.prove(parted)
            with parted.around():
                product = parted.pull(self._owner.middle(parted)(tangents, None), keep=False)
        return {name: t.detach() for name, t in product.items()}


class _Once(LinearMap):
    """By dual numbers where these are known to be right, else by kept graphs.

    So are the graphs of ordinary layers that have been read: what dual numbers cost beside is more.
    """

    def __init__(
        self, owner: ThroughOutputs, fn: ScalarFunction, params: Params, args: tuple[object, ...]
    ) -> None:
        self._owner, self._fn, self._params, self._args = owner, fn, params, args
        owner._begin(fn)

    def __call__(self, v: Params) -> Params:
        owner, forward = self._owner, _Forward(self._owner, self._fn, self._params, self._args)
        read = bool(owner._read) and getattr(self._fn, "plain", False)
        if owner._attempts >= ATTEMPTS or read:
            return self._kept()(v)
        try:
            product = forward(v)
        except Exception as error:  # whatever an op without a rule runs into
            if out_of_memory(error):
                raise
            owner._attempts = ATTEMPTS
            return self._kept()(v)
        if forward.passed <= owner._pushed:
            return product
        kept = self._kept()
        self._compare(kept, forward)
        return kept(v)

    def _kept(self, params: Params | None = None) -> LinearMap:
        return self._owner.linearize(self._fn, params or self._params, *self._args)

    def _compare(self, kept: LinearMap, forward: _Forward) -> None:
        """Whether both give the same of each parameter, in a direction like any other."""
        owner, w = self._owner, generic(self._params)
        truth, found = kept(w), forward(w)

        def again() -> Iterable[Tensor]:
            return self._kept(nudged(self._params))(w).values()

        if not agree(found.values(), truth.values(), reordered(rounding(truth.values())), again):
            owner._attempts = ATTEMPTS
        elif all(bool(truth[name].any()) for name in _reached(kept)):
            owner._pushed |= forward.passed
        else:  # zero against zero tells nothing
            owner._attempts += 1


def _reached(kept: LinearMap) -> list[str]:
    """The parameters that the outputs depend on."""
    assert isinstance(kept, KeptGraphs)
    ends = {id(leaf) for z in kept.parted.outputs for leaf in leaves_of(z)}
    return [name for name, p in kept.parted.point.items() if id(p) in ends]


ATTEMPTS = 3
"""At seeing whether dual numbers are right; then graphs are kept for single products as well."""


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
            found = pulled(gradient, places, [s[i] for i in curved], batched=k is not None)
        return [torch.zeros_like(t) if f is None else f for f, t in zip(found, s, strict=True)]

    return times
