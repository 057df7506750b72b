"""Distances, with the second derivatives of smooth functions of them where they are zero.

A distance has a kink at zero, but a function of it whose own slope is zero there (``exp(-d * d)``, Matern
kernels) has a second derivative: its own times the identity. Only the function knows that number, and it is asked
for one change of the distance alone. So the direction of the product is taken for that of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .places import Place


def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor | None:
    if p < 0 or min(x1.dim(), x2.dim()) < 2 or x1.shape[-1] != x2.shape[-1]:
        return None
    large = max(x1.shape[-2], x2.shape[-2]) > 25
    if p == 2 and (
        compute_mode == "use_mm_for_euclid_dist"
        or (compute_mode == "use_mm_for_euclid_dist_if_necessary" and large)
    ):
        return _by_product(x1, x2)
    return _minkowski(x1[..., :, None, :] - x2[..., None, :, :], p)


def pdist(input: Tensor, p: float = 2) -> Tensor | None:
    if p < 0 or input.dim() != 2:
        return None
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _minkowski(input[i] - input[j], p)


def _by_product(x1: Tensor, x2: Tensor) -> Tensor:
    """``|x - y|^2`` as one matrix product, as torch itself does it for many points."""
    norm1, norm2 = (x.square().sum(-1, keepdim=True) for x in (x1, x2))
    left = torch.cat((-2 * x1, norm1, torch.ones_like(norm1)), -1)
    right = torch.cat((x2, torch.ones_like(norm2), norm2), -1)
    squares = (left @ right.mT).clamp(min=0)
    distances = _root(squares, 2)
    *batch, i, j = pairs = (squares == 0).nonzero(as_tuple=True)
    if not len(i):
        return distances
    first, second = (x.expand(*squares.shape[:-2], -1, -1) for x in (x1, x2))
    difference = first[(*batch, i)] - second[(*batch, j)]
    difference = difference - difference.detach()  # rounding may have left a small one
    return distances.index_put(pairs, euclidean(difference, Place()))


def _minkowski(difference: Tensor, p: float) -> Tensor:
    """p-norm over the last axis; its derivatives at zero are zero, as torch's first one is."""
    if p == 2 or (p > 0 and difference.shape[-1] == 1):
        return euclidean(difference, Place())
    if p == 0:
        return (difference != 0).to(difference).sum(-1) + 0 * difference.sum(-1)
    size = difference.abs()
    if p == 1:
        return size.sum(-1)
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


def _unit(difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Length of vectors, their direction (zero for zero), and where they are zero."""
    length = _root(difference.square().sum(-1), 2)[..., None]
    zero = length == 0
    return length, difference / length.masked_fill(zero, 1), zero


class Euclidean(Function):
    """The length of vectors along the last axis."""

    generate_vmap_rule = True

    @staticmethod
    def forward(difference: Tensor, place: Place[Tensor]) -> Tensor:
        return _unit(difference)[0][..., 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        difference, ctx.place = inputs
        ctx.save_for_backward(difference)
        ctx.save_for_forward(difference)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (difference,), left = ctx.saved_tensors, ctx.place.taken()
        if left is not None:
            return g[..., None] * left, None
        if torch.is_grad_enabled():
            return gradient(g, difference, ctx.place), None
        return g[..., None] * _unit(difference)[1], None

    @staticmethod
    def jvp(ctx: Any, E: Tensor, _: None) -> Tensor:
        _length, unit, zero = _unit(*ctx.saved_tensors)
        along, far = (unit * E).sum(-1), _unit(E)[0][..., 0]
        return torch.where(zero[..., 0], far, along)


class Gradient(Function):
    """The gradient of lengths, with derivatives by what comes in and by the vectors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, difference: Tensor, place: Place[Tensor]) -> Tensor:
        return g[..., None] * _unit(difference)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.place = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, E: Tensor) -> tuple[Tensor, Tensor, None]:
        g, difference = ctx.saved_tensors
        unit, by_difference = _turned(g, difference, E)
        ctx.place.left = unit
        return (unit * E).sum(-1), by_difference, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, E: Tensor | None, _: None) -> Tensor | None:
        g, difference = ctx.saved_tensors
        if E is None:
            return None if dg is None else dg[..., None] * _unit(difference)[1]
        unit, by_difference = _turned(g, difference, E)
        return by_difference if dg is None else by_difference + dg[..., None] * unit


def _turned(g: Tensor, difference: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, those of E at smooth zeros, and the change along E of g times the given ones."""
    length, unit, zero = _unit(difference)
    change = (g[..., None] / length.masked_fill(zero, 1)).masked_fill(zero, 0)
    change = change * (E - unit * (unit * E).sum(-1, keepdim=True))
    size = g.abs()[..., None]
    smooth = zero & (size <= 100 * torch.finfo(g.dtype).eps * size.max()) if size.numel() else zero
    return torch.where(smooth, _unit(E)[1], unit), change


euclidean: Callable[[Tensor, Place[Tensor]], Tensor] = Euclidean.apply
gradient: Callable[[Tensor, Tensor, Place[Tensor]], Tensor] = Gradient.apply
