"""Formulas equal to ops of torch, made of ops that are twice differentiable.

Each takes what its op takes (the Python functions of torch.nn.functional hand a mode everything
after the tensors by keyword). It returns None where torch's own op is right, where the
arguments are invalid (torch then says so), or where no formula has the same derivatives.
"""

from __future__ import annotations

import math
import sys
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def mse_loss(
    input: Tensor, target: Tensor, *, weight: Tensor | None = None, **reduction: Any
) -> Tensor | None:
    if weight is not None:
        return None
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
    difference = input - target
    clipped = difference.clamp(-delta, delta)
    loss = clipped * (difference - 0.5 * clipped)
    return _reduce(loss if weight is None else loss * weight, **reduction)


def l1_loss(input: Tensor, target: Tensor, **reduction: Any) -> Tensor | None:
    # torch 2.13 forgets the argument `weight` when it hands `l1_loss` to a mode, so that every mode
    # changes the loss; the weight is still among the local variables of the call.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    if weight is None:
        return None
    reduction["weight"] = weight
    return F.l1_loss(input, target, **reduction)


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
    if p not in (1, 2) or input.dim() not in (1, 2):
        return None
    x, y = input.reshape(-1, input.shape[-1]), target.reshape(-1, 1)
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


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    # With scale_grad_by_freq the "gradient" is not one: a formula cannot have it.
    if scale_grad_by_freq or (padding_idx is None and max_norm is None and not sparse):
        return None
    if padding_idx is not None and not -len(weight) <= padding_idx < len(weight):
        return None
    rows = _rows(weight, input, max_norm, norm_type)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight))[..., None], rows.detach(), rows)


def torch_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    pad = None if padding_idx < 0 else padding_idx
    return embedding(indices, weight, pad, None, 2.0, scale_grad_by_freq, sparse)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    weighted = per_sample_weights is not None
    if scale_grad_by_freq or input.is_nested or input.is_floating_point() or weight.dim() != 2:
        return None
    if mode not in ("sum", "mean", "max") or (weighted and mode != "sum"):
        return None
    if (input.dim(), offsets is None) not in ((1, False), (2, True)):
        return None
    if padding_idx is not None and not -len(weight) <= padding_idx < len(weight):
        return None

    words, n = input.reshape(-1), input.numel()
    position = torch.arange(n, device=input.device)
    if offsets is None:
        n_bags = len(input)
        bag = position // max(input.shape[1], 1)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        n_bags = len(starts)
        bag = torch.searchsorted(starts, position.to(starts.dtype), right=True) - 1
    keep = torch.ones_like(words, dtype=torch.bool)
    if padding_idx is not None:
        keep = words != padding_idx % len(weight)
    rows = _rows(weight, words, max_norm, norm_type)

    if mode == "max":
        return _bag_maximum(rows, keep, bag, n_bags)
    factor = keep.to(rows.dtype)
    if per_sample_weights is not None:
        factor = factor * per_sample_weights.reshape(-1)
    total = rows.new_zeros(n_bags, rows.shape[1]).index_add(0, bag, rows * factor[:, None])
    if mode == "sum":
        return total
    return total / factor.new_zeros(n_bags).index_add(0, bag, factor).clamp(min=1)[:, None]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    norm: Tensor
    others = [i for i in range(v.dim()) if i != dim % v.dim()]
    if dim == -1:  # torch's code for one norm of the whole tensor
        norm = torch.linalg.vector_norm(v)
    else:
        norm = torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()
    return v * (g / norm)


def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor | None:
    if p <= 0 or min(x1.dim(), x2.dim()) < 2 or x1.shape[-1] != x2.shape[-1]:
        return None
    large = max(x1.shape[-2], x2.shape[-2]) > 25
    if p == 2 and (
        compute_mode == "use_mm_for_euclid_dist"
        or (compute_mode == "use_mm_for_euclid_dist_if_necessary" and large)
    ):
        # |x - y|^2 as one matrix product, as torch itself does it for many points
        norm1, norm2 = (x.square().sum(-1, keepdim=True) for x in (x1, x2))
        left = torch.cat((-2 * x1, norm1, torch.ones_like(norm1)), -1)
        right = torch.cat((x2, torch.ones_like(norm2), norm2), -1)
        return _root((left @ right.mT).clamp(min=0), 2)
    return _minkowski(x1[..., :, None, :] - x2[..., None, :, :], p)


def pdist(input: Tensor, p: float = 2) -> Tensor | None:
    if p <= 0 or input.dim() != 2:
        return None
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _minkowski(input[i] - input[j], p)


def scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor | None:
    if reduce != "prod" or input.dim() == 0 or index.numel() == 0:
        return None
    # Entries that go to one place are numbered; entry number r goes to layer r; layers multiply.
    dim = dim % input.dim()
    src = src[tuple(slice(size) for size in index.shape)]
    ordered, order = index.sort(dim=dim, stable=True)
    place = _along(torch.arange(index.shape[dim], device=index.device), dim, index)
    first = (ordered != ordered.roll(1, dim)) | (place == 0)
    number = place - torch.where(first, place, 0).cummax(dim).values
    number = torch.zeros_like(index).scatter(dim, order, number)
    size, layers = input.shape[dim], int(number.max()) + 1
    ones = torch.ones_like(input).repeat_interleave(layers, dim)
    shape = (*input.shape[:dim], layers, *input.shape[dim:])
    product = ones.scatter(dim, number * size + index, src).reshape(shape).prod(dim)
    if include_self:
        return input * product
    reached = torch.zeros_like(input, dtype=torch.bool).scatter(dim, index, True)
    return torch.where(reached, product, input)


def scatter_reduce_(input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    result = scatter_reduce(input.clone(), *args, **kwargs)
    return result if result is None else input.copy_(result)


def cholesky_inverse(input: Tensor, upper: bool = False) -> Tensor:
    identity = torch.eye(input.shape[-1], dtype=input.dtype, device=input.device)
    return torch.cholesky_solve(identity.expand_as(input), input, upper=upper)


# --- what the formulas share ------------------------------------------------------------------


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


def _rows(weight: Tensor, index: Tensor, max_norm: float | None, norm_type: float) -> Tensor:
    """Rows of an embedding.

    With `max_norm` torch shortens rows in place, outside the graph: derivatives are taken at the
    shortened rows. Here the difference is added as a constant and the weights stay as they are.
    """
    rows = F.embedding(index, weight)
    if max_norm is None:
        return rows
    norm = torch.linalg.vector_norm(rows.detach(), norm_type, -1, keepdim=True)
    scale = torch.where(norm > max_norm, max_norm / (norm + 1e-7), 1.0)
    return rows + rows.detach() * (scale - 1)


def _bag_maximum(rows: Tensor, keep: Tensor, bag: Tensor, n_bags: int) -> Tensor:
    """Largest entry of each bag, column by column; the first one where several are; 0 if empty."""
    n, d = rows.shape
    values = rows.detach().masked_fill(~keep[:, None], -math.inf)
    bags = bag[:, None].expand(n, d)
    best = values.new_full((n_bags, d), -math.inf).scatter_reduce(0, bags, values, "amax")
    hit = (values == best[bag]) & keep[:, None]
    position = torch.arange(n, device=rows.device)[:, None]
    candidate = torch.where(hit, position, n)
    chosen = candidate.new_full((n_bags, d), n).scatter_reduce(0, bags, candidate, "amin")
    return torch.cat((rows, rows.new_zeros(1, d))).gather(0, chosen)


def _minkowski(difference: Tensor, p: float) -> Tensor:
    """p-norm over the last axis; its derivatives at zero are zero, as torch's first one is."""
    size = difference.abs()
    if p == 1:
        return size.sum(-1)
    if p == 2:
        return _root(difference.square().sum(-1), 2)
    if math.isinf(p):
        largest = size.detach().amax(-1, keepdim=True)
        total = torch.where(size == largest, size, 0).sum(-1)  # torch counts each of equal ones
        return total - (total.detach() - largest[..., 0])
    nonzero = size > 0
    powers = torch.where(nonzero, torch.where(nonzero, size, 1).pow(p), 0)
    return _root(powers.sum(-1), p)


def _root(power: Tensor, p: float) -> Tensor:
    zero = power == 0
    inside = power.masked_fill(zero, 1)
    return (inside.sqrt() if p == 2 else inside.pow(1 / p)).masked_fill(zero, 0)


def _along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    """Lay a vector along one axis of a shape."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return vector.reshape(shape).expand_as(like)
