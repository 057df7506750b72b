"""Models made of nothing but ordinary layers, which need none of the policies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

CONVOLUTION_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that `hvpop.risk.formulas.convolutions` makes faster."""

BENT_LAYERS = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.LayerNorm)
"""Layers that `hvpop.risk.formulas` makes faster where they are of many numbers."""

ORDINARY = {
    nn.Sequential,
    nn.Identity,
    nn.Flatten,
    nn.Linear,
    *CONVOLUTION_LAYERS,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.MaxPool2d,
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.GELU,
    nn.ELU,
    nn.Softmax,
    nn.LogSoftmax,
}
"""Layers without random numbers, buffers, attention, checkpoints or ops that must be rewritten to be right."""

ORDINARY_IN_EVAL = {
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
}
"""Layers that are so in eval mode: they draw nothing, and read their buffers without writing to them."""

ORDINARY_LOSSES = {nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss}


def is_plain(modules: Iterable[nn.Module], loss: Any) -> bool:
    """Whether a model and its loss are of ordinary kinds, exactly, and carry no hooks.

    On a 64-32-10 network the policies would cost a tenth of a product; subclasses and anything
    unknown get them.
    """
    return type(loss) in ORDINARY_LOSSES and all(
        (type(m) in ORDINARY or (type(m) in ORDINARY_IN_EVAL and not m.training))
        and not m._forward_hooks
        and not m._forward_pre_hooks
        and "forward" not in m.__dict__  # put there by tools that patch layers
        for m in modules
    )
