"""Noticing that an opaque loss divides by something that its batches' weights do not know of."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..interception import Table


class DivisorWatch:
    """Looks at the cross entropies that a loss of the user's calls.

    A function such as ``lambda z, y: F.cross_entropy(z, y, weight=w)`` divides by the class weights
    of its targets, or by the number of targets not ignored, but does not say so. Batches can then
    not be weighted by their samples.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self.trusted = False
        """Whatever is found: whether the loss has been proven to be a mean over samples."""

    @property
    def table(self) -> Table:
        """For `hvpop.interception`."""
        return {F.cross_entropy: self.look, F.nll_loss: self.look}

    def look(self, *args: Any, **kwargs: Any) -> None:
        """Look at the arguments of a call."""
        if self.found is None and not self.trusted:
            self.found = _divisor(*args, **kwargs)


def _divisor(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> str | None:
    """What it divides by, if not by its samples."""
    if target.is_floating_point() or type(target) is not Tensor or reduction != "mean":
        return None
    if weight is not None:
        return "the class weights of its targets"
    ignored = bool((target == ignore_index).any())
    return "the number of targets not ignored" if ignored else None
