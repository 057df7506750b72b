"""What a mean loss divides by, known from the loss and its targets alone.

A weighted mean of batch losses equals the loss of all the data at once if each batch is weighted
by its own divisor. torch's losses divide by one of a few things, listed here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import content

Normaliser = Callable[[Tensor], float]
"""Targets of a batch -> what the loss divides by."""


class UnknownReductionError(ValueError):
    """A loss whose batch values cannot be averaged by sample."""


def normaliser_of(loss: Any) -> Normaliser | None:
    """How ``loss`` normalises as it is set now; None if that cannot be told from it.

    Knows torch's loss modules and functions, also through `functools.partial`.
    """
    function, settings = _settings(loss)
    if settings.get("reduction") in ("sum", "none"):
        raise UnknownReductionError(_advice(loss, settings["reduction"]))
    if function in _BY_CLASS_WEIGHT:
        ignored = settings.get("ignore_index", -100)
        return functools.partial(_counted_classes, settings.get("weight"), ignored)
    if function in _BY_ELEMENT and settings.get("reduction", "mean") == "mean":
        return lambda targets: float(targets.numel())
    return None


def _advice(loss: Any, reduction: str) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    name = getattr(loss, "__name__", None) or type(loss).__name__
    if reduction == "sum":
        return (
            f"{name} has reduction='sum', which average=SAMPLES cannot turn into a mean; "
            "use reduction='mean', or average=TOTAL for the Hessian of the sum"
        )
    return f"{name} has reduction='none': a loss must be a scalar; use reduction='mean' or 'sum'"


def _settings(loss: Any) -> tuple[Any, dict[str, Any]]:
    """The function a loss stands for, and its settings by name."""
    if isinstance(loss, functools.partial):
        function, settings = _settings(loss.func)
        return function, settings | dict(loss.keywords)
    if isinstance(loss, nn.Module):
        function = _FUNCTION_OF.get(type(loss)) or _inherited(type(loss))
        held = loss.__dict__ | loss._buffers  # quicker than to ask the module
        return function, {n: held[n] for n in _SETTINGS if n in held}
    if inspect.isfunction(loss) and loss in (_BY_CLASS_WEIGHT | _BY_ELEMENT):
        return loss, {}
    return None, {}


_SETTINGS = ("reduction", "weight", "ignore_index")


def _inherited(loss: type[nn.Module]) -> Any:
    """The function of a subclass that only adds to torch's loss, and computes it as torch does."""
    for kind, function in _FUNCTION_OF.items():
        if issubclass(loss, kind) and loss.forward is kind.forward:
            return function
    return None


def _counted_classes(weight: Tensor | None, ignored: int | None, targets: Tensor) -> float:
    """Cross entropy divides by the class weights of the targets that it does not ignore."""
    indices = type(targets) is Tensor and targets.dtype is torch.int64
    if weight is None and indices and targets.is_cpu:  # NumPy counts at a fifth of torch's cost
        array = np.frombuffer(content(targets.contiguous()), np.int64)
        if ignored is None or (ignored < 0 and array.size and array.item(array.argmin()) >= 0):
            return float(array.size)
        return float(np.count_nonzero(array != ignored))
    if targets.is_floating_point() and targets.ndim > 1:
        return float(targets.numel() / max(targets.shape[1], 1))  # class probabilities: predictions
    if targets.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            "the targets of a cross entropy are class indices (torch.int64), or probabilities of shape "
            f"(N, classes, ...), got {targets.dtype} of shape {tuple(targets.shape)}; "
            "of indices pass targets.long()"
        )
    counted = targets if ignored is None else targets[targets != ignored]
    return float(counted.numel() if weight is None else weight.to(targets.device)[counted].sum())


_FUNCTION_OF: dict[type[nn.Module], Any] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.KLDivLoss: F.kl_div,
}
_BY_CLASS_WEIGHT: set[Any] = {F.cross_entropy, F.nll_loss}
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    _FUNCTION_OF[nn.LinearCrossEntropyLoss] = F.linear_cross_entropy
    _BY_CLASS_WEIGHT.add(F.linear_cross_entropy)
_BY_ELEMENT = set(_FUNCTION_OF.values()) - _BY_CLASS_WEIGHT
