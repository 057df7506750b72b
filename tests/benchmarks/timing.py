"""Timing of several calls against each other, on a machine that others use too."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[], float]

SHORTEST = 5e-3
"""Seconds that one sample lasts at least: shorter calls are repeated within it."""

SLOW = 1.5
"""Calls that take more seconds than this are timed in `FEW` rounds only, the first ones."""

FEW = 3


@dataclass(frozen=True)
class Samples:
    """The seconds that one call took, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    def in_units_of(self, other: Samples) -> float:
        """The median over rounds of the ratio: what slows a whole round down cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=False))


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Clock = time.perf_counter,
    shortest: float = SHORTEST,
) -> dict[str, Samples]:
    """Time calls in rounds A B C, B C A, ...: all meet the same disturbances, none one predecessor.

    Every call is warmed up first; slow ones sit most rounds out. Garbage is collected between rounds, not within.
    """
    once = {name: _once(call, clock) for name, call in calls.items()}
    inner = {name: max(1, min(1000, round(shortest / t))) for name, t in once.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what exists by now is not looked at again
    gc.disable()
    try:
        for r in range(repeats):
            gc.collect()
            names = [name for name in calls if r < FEW or once[name] < SLOW]
            shift = r % len(names)
            for name in names[shift:] + names[:shift]:
                call, n = calls[name], inner[name]
                start = clock()
                for _ in range(n):
                    call()
                seconds[name].append((clock() - start) / n)
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def _once(call: Callable[[], object], clock: Clock) -> float:
    call()
    start = clock()
    call()
    return max(clock() - start, 1e-6)
