"""Activations, norms, distances, products and inverses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


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
