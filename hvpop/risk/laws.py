"""What a batch loss does with its samples, told from losses of batches apart and together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["mean", "perhaps", "sum", "neither", "nothing"]

APART = 100.0
"""How many times what rounding makes of losses they must differ by, for weights to be seen in them."""


@dataclass(frozen=True)
class Pair:
    """The losses of two batches, and of the two as one batch."""

    first: float
    second: float
    both: float
    slack: float  # what rounding, or random numbers, may make of these

    def verdict(self, w: float, u: float) -> Verdict:
        """Whether the loss is a mean over batches of weights w and u.

        "perhaps" if nothing speaks against it but losses are too much alike to tell the weights;
        "nothing" if it might as well be a sum.
        """
        if not all(map(math.isfinite, (self.first, self.second, self.both))):
            return "nothing"
        mean = abs((w * self.first + u * self.second) / (w + u) - self.both) <= self.slack
        total = abs(self.first + self.second - self.both) <= self.slack
        if mean:
            if total or min(abs(self.first + self.second), abs(self.both)) <= 2 * self.slack:
                return "nothing"
            return "mean" if abs(self.first - self.second) > APART * self.slack else "perhaps"
        if total:
            sure = min(abs(self.first), abs(self.second)) > 4 * self.slack
            return "sum" if sure else "nothing"
        return "neither"

    @property
    def share(self) -> float:
        """Of the first in the weight of both, if the loss is some weighted mean."""
        return (self.both - self.second) / (self.first - self.second)

    @property
    def doubt(self) -> float:
        """What the share may be off by."""
        apart = abs(self.first - self.second)
        return self.slack / apart if apart > 0 else math.inf


def divisor(first: Pair, second: Pair, across: Pair) -> Literal["sum", "divisor", "neither"] | None:
    """What the loss divides by, from the pairs (a, b), (b, c) and (a, c) of three batches.

    A mean with weights of any kind has ``w_a/w_b w_b/w_c = w_a/w_c``, a sum the same rest each time;
    None if that cannot be seen.
    """
    pairs = (first, second, across)
    if not all(math.isfinite(x) for p in pairs for x in (p.first, p.second, p.both)):
        return None
    if any(p.doubt > 1 / APART for p in pairs):
        return None
    rests = [p.first + p.second - p.both for p in pairs]
    if max(rests) - min(rests) <= 2 * max(p.slack for p in pairs):
        return "sum"
    odds, doubt = 0.0, 0.0
    for p, sign in zip(pairs, (1, 1, -1), strict=True):
        if not p.doubt < p.share < 1 - p.doubt:
            return "neither"
        odds += sign * math.log(p.share / (1 - p.share))
        doubt += 2 * p.doubt / (p.share * (1 - p.share))
    if doubt > 1 / APART:
        return None
    return "divisor" if abs(odds) <= doubt else "neither"
