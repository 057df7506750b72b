"""The loss of a batch as a function of parameters, at work inside the user's model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import _torch
from ..exchange import Exchange, Ungraded, guarded, without_cudnn
from ..graph import backward, leaves_of
from ..interception import Interception, Table
from . import canaries, policies
from .description import Description
from .losses import BatchLoss, scalar
from .policies import WATCHED, FunctionsWatched, TwiceDifferentiable
from .randomness import (
    GLOBAL,
    PrivateRNG,
    beside_torch,
    rewind,
    seed_all,
    torch_states,
)
from .rewrites import TABLES, Rewrites
from .samples import Positioned
from .settings import Snapshot
from .terms import noting

Tensors = dict[str, Tensor]

_NOTHING = nullcontext()


class Observer(Protocol):
    """What wants to know of evaluations."""

    @property
    def table(self) -> Table: ...

    def observe(self, value: Tensor, params: Tensors) -> None: ...


class LossFunction:
    """``function(params, state, batch, seed)``: the loss of a batch, a 0-dim tensor.

    While anything of the user's may run on its behalf, the model holds the point: whoever takes
    derivatives enters `at` around the evaluation and the backward passes that follow. Live, it is of
    the model as it was last looked at; frozen, of what it was when the snapshot was taken.
    """

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        batch_loss: BatchLoss,
        observer: Observer,
        snapshot: Snapshot | None = None,
    ) -> None:
        _torch.say_if_newer()
        self.now = Description(roots, batch_loss)
        self.hooked = False
        """Whether the last evaluation put hooks on tensors."""
        self._observer = observer
        self._snapshot = snapshot
        self._at: _At | None = None
        self._draws: bool | None = None  # beside torch's random numbers; None: not known yet

    @property
    def plain(self) -> bool:
        """Whether there are none of these, nor anything else that an author differentiates."""
        return self.now.plain

    def look(self) -> Description:
        """What model and loss are now."""
        self.now = Description(self.now.roots, self.now.batch_loss)
        if not self.now.plain:
            guarded(canaries.broken)  # here, where nothing is traced
        return self.now

    def frozen(self, look: Description) -> LossFunction:
        """The same function with every setting as it is now."""
        frozen = LossFunction(look.roots, look.batch_loss, self._observer, look.snapshot())
        frozen.now, frozen._draws = look, self._draws
        return frozen

    def __call__(self, params: Tensors, state: Tensors, batch: Any, seed: Tensor | None) -> Tensor:
        if self._at is None:
            return guarded(lambda: self._evaluated(params, state, batch, seed))
        return self._evaluated(params, state, batch, seed)

    def at(
        self, params: Tensors, state: Tensors, batch: Any = None, seed: Any = None
    ) -> AbstractContextManager[None]:
        """The model at a point, for as long as derivatives are taken there.

        Of ordinary layers nothing but the evaluation itself can look at the model.
        """
        return _NOTHING if self.now.plain else _Seeded(self, params, state, seed)

    def place(self, params: Tensors, state: Tensors) -> AbstractContextManager[None]:
        """The model at a point throughout many evaluations, which makes it cheaper for each."""
        return _NOTHING if self.now.plain or self.is_at(params, state) else _At(self, params, state)

    def is_at(self, params: Tensors, state: Tensors) -> bool:
        """Whether the model holds that point already."""
        return self._at is not None and self._at.is_at(params, state)

    def gradient(self, params: Tensors, state: Tensors, batch: Any, seed: Tensor | None) -> Tensors:
        """The gradient as a training step has it: a plain ``backward()``, no rewrites.

        A reference for checks; zeros for parameters that get none.
        """
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}

        def compute() -> Tensors:
            with _At(self, leaves, state, twice=False), _Seeded(self, leaves, state, seed):
                return backward(self._within(batch, seed), leaves)

        reached = guarded(compute)
        return {name: reached.get(name, torch.zeros_like(p)) for name, p in leaves.items()}

    def draws(self, params: Tensors, state: Tensors, batch: Any, seed: Tensor) -> bool:
        """Whether an evaluation draws random numbers."""
        if self.now.plain:
            return False

        def look() -> bool:
            with _Seeded(self, params, state, seed):
                before = torch_states()
                self._within(batch, seed)
                return bool(self._draws) or not all(map(torch.equal, before, torch_states()))

        return guarded(look)

    def untouched_gradient(self, batch: Any, seed: Tensor) -> Tensors:
        """The same at the live parameters, where it reaches them, in a way of its own.

        Nothing is exchanged but buffers.
        """
        held = self.now.inventory
        generators = [*GLOBAL, *self.now.generators]
        trained = {n: p for n, p in held.parameters.items() if p.requires_grad}

        def compute() -> Tensors:
            buffers = {name: t.clone() for name, t in held.buffers.items()}
            with (
                PrivateRNG(generators),
                held.holding(buffers),
                without_cudnn() if held.recurrent else nullcontext(),
            ):
                seed_all(int(seed), generators)
                return backward(_value(self.now, batch), trained)

        return guarded(compute)

    def _evaluated(
        self, params: Tensors, state: Tensors, batch: Any, seed: Tensor | None
    ) -> Tensor:
        now = self.now
        if now.plain:
            live = now.inventory.parameters
            in_place = not state and all(live.get(n) is p for n, p in params.items())
            with (
                nullcontext()
                if in_place and self._snapshot is None
                else now.inventory.holding(state | params, self._snapshot),
                Rewrites() if now.gains(batch) else nullcontext(),
            ):
                value = _value(now, batch)
        else:
            with self.at(params, state, batch, seed):
                value = self._within(batch, seed)
        self._observer.observe(value, params)
        return value

    def _within(self, batch: Any, seed: Tensor | None) -> Tensor:
        """The loss at the point that the model holds."""
        assert self._at is not None
        self.seed(seed)
        before = beside_torch()
        value = self._at.value(batch)
        drawn = bool(self.now.generators) or beside_torch() != before
        if drawn and seed is not None and type(seed) is not Tensor:
            raise RuntimeError("the loss draws random numbers beside torch's")  # no trace has them
        if drawn and self._draws is False:  # for the first time, and not from the seed
            rewind(before)
            self._draws = True
            with _Seeded(self, *self._at.point, seed):
                return self._at.value(batch)
        self._draws = drawn or bool(self._draws)
        return value

    @property
    def generators(self) -> list[Any]:
        """What is seeded beside torch: all there is, unless evaluations have been without."""
        return [] if self._draws is False else [*GLOBAL, *self.now.generators]

    def seed(self, seed: Tensor | None) -> None:
        """Let random numbers start from ``seed``. A fake tensor is one that is traced, not run."""
        if type(seed) is Tensor:
            seed_all(int(seed), self.generators)


@dataclass(frozen=True)
class OfLosses:
    """A function that is made of a loss function, and needs what that one needs."""

    function: LossFunction

    def at(self, params: Tensors, state: Tensors, *data: Any) -> AbstractContextManager[None]:
        return self.function.at(params, state)

    @property
    def hooked(self) -> bool:
        return self.function.hooked

    @property
    def plain(self) -> bool:
        return self.function.plain


class Total(OfLosses):
    """The weighted mean of the losses of some batches, as one function."""

    def __call__(
        self,
        params: Tensors,
        state: Tensors,
        weights: tuple[float, ...],
        data: list[tuple[Any, Tensor]],
    ) -> Tensor:
        batches = zip(weights, data, strict=True)
        losses = [w * self.function(params, state, *batch) for w, batch in batches]
        return torch.stack(losses).sum() / sum(weights)


class _At(Exchange):
    """The model at a point, and all that an evaluation needs around it.

    If not ``twice``, only what a training step has: first derivatives, by torch's own kernels.
    """

    def __init__(
        self,
        function: LossFunction,
        params: Tensors,
        state: Tensors,
        twice: bool = True,
    ) -> None:
        super().__init__()
        self._function, self._twice = function, twice
        self.point = self._params, self._state = params, state

    def is_at(self, params: Tensors, state: Tensors) -> bool:
        """Whether the point is this one."""
        return (params is self._params or _same(params, self._params)) and (
            state is self._state or _same(state, self._state)
        )

    def _change(self) -> None:
        function, now = self._function, self._function.now
        buffers, live = now.inventory.buffers, now.inventory.parameters
        held = {n: t.clone() if n in buffers else t for n, t in self._state.items()} | self._params
        stand_ins = {id(live[n]): t for n, t in held.items() if n in live and live[n] is not t}
        self._replaced = {i for i, t in stand_ins.items() if t.is_leaf}  # others come from theirs
        self._enter(FunctionsWatched())
        if self._twice:
            self._enter(TwiceDifferentiable())
        elif now.inventory.recurrent:  # cuDNN has no derivative of these in eval mode
            self._enter(without_cudnn())
        self._enter(now.inventory.holding(held, function._snapshot))
        self._enter(Ungraded(self._params.values()))  # backward passes inside others add to them
        rewrites = TABLES if self._twice else ()
        tables = WATCHED, function._observer.table, *rewrites
        self._tables, self._stand_ins = tables, stand_ins
        self._noted(setattr, function, "_at", function._at)
        function._at = self

    def interception(self) -> Interception:
        """What looks at the calls of an evaluation, and of the backward passes after it."""
        return Interception(*self._tables, stand_ins=self._stand_ins)

    def value(self, batch: Any) -> Tensor:
        """The loss of a batch; each evaluation begins from the same buffers and attributes."""
        now = self._function.now
        buffers = {n: t.clone() for n, t in self._state.items() if n in now.inventory.buffers}
        policies.hooks.clear()
        with now.inventory.holding(buffers):
            value = _value(now, batch)
        self._function.hooked = bool(policies.hooks)
        canaries.refuse_what_is_not_seen(value)
        if self._replaced and any(id(leaf) in self._replaced for leaf in leaves_of(value)):
            raise RuntimeError(
                "the loss holds on to parameters of the model where their exchange cannot be seen (as "
                "arguments of a custom autograd.Function); let it read them from the model"
            )
        return value


class _Seeded(Exchange):
    """A function at a point, with random numbers of its own from a seed."""

    def __init__(
        self, function: LossFunction, params: Tensors, state: Tensors, seed: Tensor | None
    ) -> None:
        super().__init__()
        self._function, self._point, self._seed = function, (params, state), seed

    def _change(self) -> None:
        function = self._function
        if not function.is_at(*self._point):
            self._enter(_At(function, *self._point))
        assert function._at is not None
        # Not around a whole product: every call of torch is looked at.
        self._enter(function._at.interception())
        self._enter(PrivateRNG(function.generators))
        function.seed(self._seed)


def _value(now: Description, batch: Any) -> Tensor:
    """The loss of a batch, by the model as it is."""
    own = batch.batch if isinstance(batch, Positioned) else batch
    with noting():
        return scalar(now.batch_loss(now.roots[""], own))


def _same(a: Tensors, b: Tensors) -> bool:
    return len(a) == len(b) and all(b.get(name) is tensor for name, tensor in a.items())
