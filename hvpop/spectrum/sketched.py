"""Sampling with a sketch: the rounds in which it grows, shared by the estimates that use one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..operators import probes
from .known import Known
from .sampling import Completing, History
from .sketch import LeaveOut, Split, beside, extend


@dataclass(frozen=True)
class SplitState:
    """A `Split`, with its price and past."""

    split: Split
    known: Known
    products: int = 0
    history: History = ()


class SplitSampling(Completing[SplitState]):
    """Rounds of a `Split`: a sketch, its basis, and probes for what is outside."""

    unit, state_type = 3, SplitState
    vectors = (*Completing.vectors, *(f"split.{name}" for name in ("Q", "Z", "G", "AG")))

    def start(self) -> SplitState:
        return SplitState(Split.empty(self.A, self.dtype), self.nothing())

    def sampled(self, state: SplitState, left: int) -> SplitState:
        affordable = left // self.unit
        sketch = self.drawn(probes.gaussian, self.A.T.space, state, affordable, "sketch")
        G = self.drawn(probes.signs, self.space, state, affordable, "probe")
        A, count = self.source, G.shape[1]
        if A.symmetric:  # one pass for both
            both = A @ beside(sketch, G)
            Y, AG = both[:, :count], both[:, count:]
        else:
            Y, AG = A.T @ sketch, A @ G
        if self.flat(state, extend(self.space, state.split.Q, Y)[0]):
            return replace(state, products=state.products + 2 * count)
        split = state.split.grown(A, Y, G, AG)
        return replace(state, split=split, products=state.products + 3 * count)

    def samples(self, state: SplitState) -> int:
        return state.split.G.shape[1]


@dataclass(frozen=True)
class LeaveOutState:
    """A `LeaveOut`, with its price and past."""

    sketch: LeaveOut
    known: Known
    products: int = 0
    history: History = ()


class LeaveOutSampling(Completing[LeaveOutState]):
    """Rounds of a `LeaveOut` sketch, in which every probe is left out in turn."""

    unit, state_type = 2, LeaveOutState
    vectors = (*Completing.vectors, "sketch.Omega", "sketch.Q", "sketch.Z")
    keep = False  # whether the estimate needs A Q itself

    def start(self) -> LeaveOutState:
        empty = LeaveOut.empty(self.A.held[0], self.dtype, self.A.device)
        return LeaveOutState(empty, self.nothing())

    draw: Callable[..., Tensor]  # one of the functions of `probes`

    def sampled(self, state: LeaveOutState, left: int) -> LeaveOutState:
        Omega = self.drawn(self.draw, self.space, state, left // self.unit)
        Y = self.source @ Omega
        if self.keep and self.flat(state, extend(self.space, state.sketch.Q, Y)[0]):
            return replace(state, products=state.products + Omega.shape[1])
        sketch = state.sketch.grown(self.source, Omega, Y, keep=self.keep)
        return replace(state, sketch=sketch, products=state.products + 2 * Omega.shape[1])

    def samples(self, state: LeaveOutState) -> int:
        return state.sketch.Q.shape[1]
