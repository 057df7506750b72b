"""Losses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _torch


def mse_loss(
    input: Tensor, target: Tensor, *, weight: Tensor | None = None, **reduction: Any
) -> Tensor | None:
    if weight is not None:
        return None
    _warn_of_sizes(F.mse_loss, input, target)
    difference = input - target
    return _reduce(difference * difference, **reduction)


def huber_loss(
    input: Tensor,
    target: Tensor,
    *,
    delta: float = 1.0,
    weight: Tensor | None = None,
    **reduction: Any,
) -> Tensor | None:
    if delta <= 0 or (weight is not None and weight.shape != input.shape):
        return None
    _warn_of_sizes(F.huber_loss, input, target)
    difference = input - target
    clipped = difference.clamp(-delta, delta)
    loss = clipped * (difference - 0.5 * clipped)
    return _reduce(loss if weight is None else loss * weight, **reduction)


def l1_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor | None:
    weight = forgotten_weight()
    if weight is None:
        return None
    reduction["weight"] = weight
    return F.l1_loss(input, target, **reduction)


def forgotten_weight() -> Tensor | None:
    """The argument of `l1_loss` that torch 2.13 forgets when it hands the call to a mode.

    So that every mode changes the loss. It is still among the local variables of the call.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weight")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    options: Any = None,
    **others: Any,
) -> Tensor | None:
    smooth = others.get("label_smoothing", 0.0) != 0
    if options is None or smooth or linear_weight.dim() != 2 or target.dtype != torch.int64:
        return None  # torch runs these without chunks, perhaps with a warning
    if reduction not in ("mean", "sum", "none") or _torch.tracing_state() is not None:
        return None
    tensors = input, linear_weight
    if input.dtype in (torch.float16, torch.bfloat16):  # chunks are added up in float32
        tensors = input.float(), linear_weight.float()
        others |= {k: v.float() for k, v in others.items() if isinstance(v, Tensor)}
    loss = F.linear_cross_entropy(*tensors, target, reduction=reduction, **others)
    return loss.to(input.dtype)


def soft_margin_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor | None:
    return _reduce(-F.logsigmoid(target * input), **reduction)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    *,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    **reduction: Any,
) -> Tensor | None:
    if p not in (1, 2) or input.dim() > 2:
        return None
    x, y = torch.atleast_2d(input), target.reshape(-1, 1)
    slack = F.relu(margin - x.gather(1, y) + x).scatter(1, y, 0)
    if p == 2:
        slack = slack * slack
    if weight is not None:
        slack = slack * weight[y]
    return _reduce((slack.sum(1) / x.shape[1]).reshape(target.shape), **reduction)


def multilabel_margin_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor | None:
    if input.dim() not in (1, 2) or input.shape != target.shape:
        return None
    x, y = (z.reshape(-1, z.shape[-1]) for z in (input, target))
    listed = (y >= 0).cumprod(1)  # the labels before the first -1
    y = y.clamp(min=0)
    positive = torch.zeros_like(y).scatter_add(1, y, listed) > 0
    slack = F.relu(1 - x.gather(1, y)[:, :, None] + x[:, None, :])
    counted = listed.bool()[:, :, None] & ~positive[:, None, :]
    loss = (slack * counted).sum((1, 2)) / x.shape[1]
    return _reduce(loss.reshape(input.shape[:-1]), **reduction)


_IMPOSSIBLE = -1e30  # a log-probability: finite, so that no derivative becomes inf - inf


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | tuple[int, ...],
    target_lengths: Tensor | tuple[int, ...],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor | None:
    # The forward recursion over the labels with blanks between them (Graves et al., 2006).
    one = log_probs.dim() == 2
    if one:
        log_probs, targets = log_probs[:, None], targets.reshape(1, -1)
    device = log_probs.device
    frames = torch.as_tensor(input_lengths, dtype=torch.long, device=device).reshape(-1)
    lengths = torch.as_tensor(target_lengths, dtype=torch.long, device=device).reshape(-1)
    states = _with_blanks(targets.to(device).long(), lengths, blank)
    no_skip = states[:, 2:] == states[:, :-2]

    emissions = log_probs.gather(2, states.expand(log_probs.shape[0], -1, -1))
    emissions = emissions.clamp(min=_IMPOSSIBLE)
    alpha = log_probs.new_full(states.shape, _IMPOSSIBLE)
    alpha[:, 0] = 0  # one step before the first frame
    for t, emission in enumerate(emissions):
        step = F.pad(alpha[:, :-1], (1, 0), value=_IMPOSSIBLE)
        skip = F.pad(alpha[:, :-2].masked_fill(no_skip, _IMPOSSIBLE), (2, 0), value=_IMPOSSIBLE)
        skip = skip[:, : states.shape[1]]
        reached = torch.logsumexp(torch.stack((alpha, step, skip)), 0) + emission
        alpha = torch.where((t < frames)[:, None], reached, alpha)

    last = 2 * lengths[:, None]
    before = alpha.gather(1, (last - 1).clamp(min=0)).masked_fill(last == 0, _IMPOSSIBLE)
    loss = -torch.logsumexp(torch.cat((alpha.gather(1, last), before), 1), 1)
    # torch's derivative takes log_probs as normalised: it adds exp(log_probs), which a log_softmax
    # before it cancels. This term has value zero and that derivative.
    active = torch.arange(len(log_probs), device=device)[:, None] < frames
    mass = (log_probs.exp().sum(2) * active).sum(0)
    loss = loss + (mass - mass.detach())
    loss = loss.masked_fill(loss > -0.1 * _IMPOSSIBLE, 0.0 if zero_infinity else math.inf)
    if reduction == "mean":
        loss = loss / lengths.clamp(min=1)
    return _reduce(loss[0] if one else loss, reduction)


def torch_ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | tuple[int, ...],
    target_lengths: Tensor | tuple[int, ...],
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor | None:
    lengths = input_lengths, target_lengths
    name = ("none", "mean", "sum")[reduction]
    return ctc_loss(log_probs, targets, *lengths, blank, name, zero_infinity)


def _warn_of_sizes(loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor) -> None:
    """Let torch say that broadcasting may not be what was meant."""
    if target.size() != input.size():
        loss(input.detach(), target.detach())


def _reduce(
    loss: Tensor,
    reduction: str = "mean",
    size_average: bool | None = None,
    reduce: bool | None = None,
) -> Tensor | None:
    """Reduce as the losses of torch do; its two older arguments win when given."""
    if reduce is False:
        reduction = "none"
    elif size_average is not None or reduce is not None:
        reduction = "sum" if size_average is False else "mean"
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss if reduction == "none" else None


def _with_blanks(targets: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """Labels of each sequence, blanks before, between and after them, (N, 2 S + 1)."""
    if targets.dim() == 1:
        longest = int(lengths.max()) if len(lengths) else 0
        place = (lengths.cumsum(0) - lengths)[:, None] + torch.arange(longest).to(lengths)
        targets = targets[place.clamp(max=len(targets) - 1)]
    n, s = targets.shape
    outside = torch.arange(s, device=targets.device) >= lengths[:, None]
    states = targets.new_full((n, 2 * s + 1), blank)
    states[:, 1::2] = targets.masked_fill(outside, blank)
    return states
