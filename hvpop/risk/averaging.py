"""How batches are weighted against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Average:
    """Which average of the batch Hessians ``H_b`` an operator is.

    ``sum_b w_b H_b / sum_b w_b``, with ``w_b = weight(batch)``, or without the division if not
    ``normalized``. Three are ready made:

    - `SAMPLES`: ``w_b`` is what the loss itself divides by (samples; tokens not ignored; class
      weights), so that the result is that of one batch with all the data;
    - `BATCHES`: every batch counts alike;
    - `TOTAL`: the plain sum.

    Parameters
    ----------
    weight
        Takes a batch as the data yields it, returns its weight. None stands for the loss's own.
    normalized
        Whether to divide by the sum of the weights.

    Examples
    --------
    >>> from hvpop import Average
    >>> by_tokens = Average(weight=lambda batch: float((batch["labels"] != -100).sum()))
    """

    weight: Callable[[Any], float] | None = None
    normalized: bool = True
    name: str = "Average"

    def __repr__(self) -> str:
        return self.name


def _one(batch: Any) -> float:
    return 1.0


SAMPLES = Average(name="SAMPLES")
BATCHES = Average(_one, name="BATCHES")
TOTAL = Average(_one, normalized=False, name="TOTAL")
