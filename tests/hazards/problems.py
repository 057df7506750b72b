"""A classification problem in uneven batches, and the truth about it, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.problems import (
    Apply,
    classes,
    dense_hessian,
    error,
    mlp,
    random,
    regression,
    set_parameters,
    split,
)

__all__ = [
    "EXACT",
    "Apply",
    "classes",
    "dense_hessian",
    "error",
    "labelled",
    "mlp",
    "random",
    "regression",
    "set_parameters",
    "split",
    "truth",
    "vector",
]

EXACT = 1e-12
"""Relative: sums of some hundred float64 products in another order."""


def labelled(n: int = 23) -> tuple[Tensor, Tensor]:
    """Return inputs (n, 4) and class indices (n,)."""
    return random(n, 4, seed=1), classes(n, seed=2)


def vector(model: nn.Module) -> Tensor:
    """Return a normal vector over the trainable parameters."""
    return random(sum(p.numel() for p in model.parameters() if p.requires_grad), seed=3)


def truth(
    model: nn.Module, x: Any, y: Tensor, loss: Callable[..., Tensor] = F.cross_entropy
) -> Tensor:
    """Return the Hessian (n, n) of the loss of one batch, by plain double backward."""
    return dense_hessian(model, lambda: loss(model(x), y))
