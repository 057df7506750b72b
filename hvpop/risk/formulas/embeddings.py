"""Rows of tables, and bags of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
