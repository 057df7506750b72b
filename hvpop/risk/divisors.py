"""Noticing that an opaque loss divides by something that its batches' weights do not know of."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..interception import Table


class DivisorWatch:
    """Looks at the cross entropies that a loss of the user's calls.

    A function such as ``lambda z, y: F.cross_entropy(z, y, weight=w)`` divides by the class weights
    of its targets, or by the number of targets not ignored, but does not say so. Batches can then
    not be weighted by their samples. One that takes the terms one by one, some of them ignored, may
    divide by either number.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self.doubtful = self._warned = False

    @property
    def table(self) -> Table:
        """For `hvpop.interception`."""
        return {F.cross_entropy: self._look, F.nll_loss: self._look}

    def _look(self, *args: Any, **kwargs: Any) -> None:
        if self.found is None:
            self.found, doubtful = _divisor(*args, **kwargs)
            self.doubtful |= doubtful

    def refuse(self) -> None:
        """Raise if batches cannot be weighted by samples; warn once if perhaps they cannot."""
        if self.found is not None:
            raise ValueError(
                f"the loss divides by {self.found}, which differs from batch to batch and cannot be "
                "told from outside; pass the loss as torch.nn.CrossEntropyLoss(...) or "
                "functools.partial(F.cross_entropy, ...), or average=Average(weight=...) with a "
                "function that returns the divisor of a batch"
            )
        if self.doubtful and not self._warned:
            self._warned = True
            warnings.warn(
                "the loss sums up a cross entropy of which some targets are ignored, and what it divides "
                "by cannot be told from outside: batches are weighted by their samples, which is wrong "
                "if it is the number of targets not ignored; then pass average=Average(weight=...) with "
                "a function that returns that number",
                stacklevel=2,
            )


def _divisor(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[str | None, bool]:
    """What it divides by, if not by its samples, and whether the caller may divide by such a number."""
    if target.is_floating_point() or type(target) is not Tensor:
        return None, False
    if reduction == "mean" and weight is not None:
        return "the class weights of its targets", False
    ignored = bool((target == ignore_index).any())
    if reduction != "mean":
        return None, ignored
    return "the number of targets not ignored" if ignored else None, False
