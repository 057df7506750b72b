"""The terms that a loss is a mean of, told by the calls of torch's loss functions in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interception import Interception, Table
from ..marker import Call, called, is_watched
from .formulas.losses import forgotten_weight


def noting() -> AbstractContextManager[None]:
    """While derivatives are taken apart where loss functions are called: tells which are."""
    return Interception(_NOTED) if is_watched() else nullcontext()


def settings(call: Call) -> dict[str, Any]:
    """All arguments of a call by name."""
    bound = _signature(call.loss).bind(call.input, *call.args, **call.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def weights(call: Call) -> Tensor:
    """How much each term of a call counts, in the order and shape of its terms.

    Those of a cross entropy are its targets, by class weight, 0 if ignored; those of other losses
    are entries of what they are handed.
    """
    given = settings(call)
    target, z = given.get("target"), call.input
    if call.loss in WEIGHTED and given.get("weight") is not None:
        return torch.as_tensor(given["weight"]).to(z).expand(z.shape)
    if call.loss not in CLASSES or not isinstance(target, Tensor):
        return z.new_ones(z.shape)
    if target.is_floating_point():  # probabilities: a prediction each
        return z.new_ones(z.shape[:1] + z.shape[2:] if z.ndim > 1 else ())
    counted: Tensor = target != given["ignore_index"]
    by_class: Tensor | None = given["weight"]
    if by_class is None:
        return counted.to(z.dtype)
    return torch.where(counted, by_class[torch.where(counted, target, 0)], 0.0).to(z.dtype)


def reaching(calls: Iterable[Call], loss: Tensor) -> list[tuple[Call, Tensor]]:
    """The calls whose value the loss depends on, with its derivative by that.

    Others are inside the model, or for the record. A derivative that itself depends on something is
    of a loss that is no multiple of what was called: focal losses are powers of it.
    """
    known = [call for call in calls if loss.requires_grad and call.value.requires_grad]
    if not known:
        return []
    values = [call.value for call in known]
    found = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
    return [(call, a) for call, a in zip(known, found, strict=True) if a is not None]


def shares(call: Call, slope: Tensor) -> Tensor:
    """By how much each term is multiplied where all of them add up to the call's part of the loss."""
    counts = weights(call)
    mean = settings(call).get("reduction", "mean") == "mean"
    return (slope * counts / counts.sum() if mean else slope * counts).detach()


def divisor(call: Call) -> float | None:
    """What a call divides by; None if it is no mean."""
    given = settings(call)
    reduction = given.get("reduction", "mean")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    if reduction == "batchmean":
        return float(call.input.shape[0])
    if reduction != "mean":
        return None
    target = given.get("target")
    if by_entry(call) and isinstance(target, Tensor) and given.get("weight") is None:
        return float(torch.broadcast_shapes(call.input.shape, target.shape).numel())
    return float(weights(call).sum())


def by_entry(call: Call) -> bool:
    """Whether a term is one entry of what the loss is handed, and not a vector of classes."""
    return call.loss not in CLASSES


@cache
def _signature(loss: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(loss)


def _noting(loss: Callable[..., Any]) -> Callable[..., Any]:
    def noted(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if loss is F.l1_loss and (weight := forgotten_weight()) is not None:
            kwargs["weight"] = weight
        return called(loss, input, args, kwargs)

    return noted


CLASSES: set[Callable[..., Any]] = {F.cross_entropy, F.nll_loss}
"""Whose terms are vectors of classes, along the dimension 1 (of a single one, the only one)."""

WEIGHTED: set[Callable[..., Any]] = {F.mse_loss, F.l1_loss}
"""That divide by the weights of their entries, where they are given some."""

_BY_ENTRY: list[Callable[..., Any]] = [
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss,
    F.gaussian_nll_loss,
    F.soft_margin_loss,
    F.kl_div,
]

_NOTED: Table = {loss: _noting(loss) for loss in (*CLASSES, *_BY_ENTRY)}
