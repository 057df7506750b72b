"""Sampling with a sketch: the rounds in which it grows, shared by the estimates that use one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from . import probes
from .sampling import History, Sampling
from .sketch import LeaveOut, Split


@dataclass(frozen=True)
class SplitState:
    """A `Split`, with its price and past."""

    split: Split
    products: int = 0
    history: History = ()


class SplitSampling(Sampling[SplitState]):
    """Rounds of a `Split`: a sketch, its basis, and probes for what is outside."""

    unit, state_type = 3, SplitState

    def start(self) -> SplitState:
        return SplitState(Split.empty(self.A, self.dtype))

    def advance(self, state: SplitState, left: int) -> SplitState:
        (m, n), affordable = self.A.shape, left // self.unit
        sketch = self.drawn(probes.gaussian, m, state, affordable, "sketch")
        G = self.drawn(probes.signs, n, state, affordable, "probe")
        split = state.split.grown(self.A, sketch, G)
        return self.noted(SplitState(split, state.products + 3 * G.shape[1], state.history))

    def samples(self, state: SplitState) -> int:
        return state.split.G.shape[1]

    def exhausted(self, state: SplitState) -> bool:
        return state.split.Q.shape[1] == state.split.Q.shape[0]

    def pack(self, state: SplitState) -> dict[str, Any]:
        packed = super().pack(state)
        return {**_parts(packed.pop("split")), **packed}

    def unpack(self, saved: Mapping[str, Any]) -> SplitState:
        names = [field.name for field in fields(Split)]
        rest = {key: value for key, value in saved.items() if key not in names}
        return super().unpack({"split": Split(*(saved[name] for name in names)), **rest})


@dataclass(frozen=True)
class LeaveOutState:
    """A `LeaveOut`, with its price and past."""

    sketch: LeaveOut
    products: int = 0
    history: History = ()


class LeaveOutSampling(Sampling[LeaveOutState]):
    """Rounds of a `LeaveOut` sketch, in which every probe is left out in turn."""

    unit, state_type = 2, LeaveOutState
    keep = False  # whether the estimate needs A Q itself

    def start(self) -> LeaveOutState:
        return LeaveOutState(LeaveOut.empty(self.A.shape[0], self.dtype, self.A.device))

    draw: Callable[..., Tensor]  # one of the functions of `probes`

    def advance(self, state: LeaveOutState, left: int) -> LeaveOutState:
        n, N = state.sketch.Q.shape
        Omega = self.drawn(self.draw, n, state, min(left // self.unit, n - N))
        sketch = state.sketch.grown(self.A, Omega, keep=self.keep)
        return self.noted(LeaveOutState(sketch, state.products + 2 * Omega.shape[1], state.history))

    def samples(self, state: LeaveOutState) -> int:
        return state.sketch.Q.shape[1]

    def exhausted(self, state: LeaveOutState) -> bool:
        return state.sketch.Q.shape[1] == state.sketch.Q.shape[0]

    def pack(self, state: LeaveOutState) -> dict[str, Any]:
        packed = super().pack(state)
        return {**_parts(packed.pop("sketch")), **packed}

    def unpack(self, saved: Mapping[str, Any]) -> LeaveOutState:
        names = [field.name for field in fields(LeaveOut)]
        rest = {key: value for key, value in saved.items() if key not in names}
        return super().unpack({"sketch": LeaveOut(*(saved[name] for name in names)), **rest})


def _parts(record: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, not copied."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
