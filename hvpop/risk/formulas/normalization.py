"""Layer norms whose second derivative is in closed form, made of the kernel of the first.

With rows ``x``, their mean ``mu`` and ``rho = 1 / sqrt(var + eps)``, the normalized rows are ``n = rho (x - mu)``, and
their derivative along ``d`` is ``rho (d - mean(d) - n mean(n d))``: a symmetric matrix for each row, so that the kernel
of the gradient applies it, too. What it gives for ``w g``, the gradient ``s``, has along ``d`` the derivative
``-rho (mean(w g n) dn + mean(s d) n + mean(n d) s)``. torch's own formula takes some thirty passes over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ... import _torch
from ...graph import signed, wanted
from .convolutions import is_ordinary

SMALL = 2**17
"""Numbers to normalize below which torch's own way is taken: there the calls from Python cost a live product
more than the passes save. Time of a kept and of a live product of a layer, relative to torch's (float32, one thread
of a CPU): 1.01 and 1.57 at 2**13, 0.82 and 0.99 at 2**16, 0.60 and 0.62 at 2**20 and more; of a transformer with seven
of 2**16, 1.00 and 1.04 to 1.09. On an H200: 0.72 to 0.81 and 1.13 to 1.23 from 2**16 to 2**22, 0.42 to 0.49 and 0.64
to 0.67 at 2**24."""

Three = tuple[Tensor | None, Tensor | None, Tensor | None]

_backward: Any = torch.ops.aten.native_layer_norm_backward.default


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """For ``F.layer_norm``; None where torch's own way is taken: small, without weight, forward mode."""
    shape = tuple(normalized_shape)
    if weight is None or bias is None or not is_ordinary(input, weight, bias):
        return None
    if not shape or {input.shape[-len(shape) :], weight.shape, bias.shape} != {shape}:
        return None  # which torch refuses
    if input.numel() < SMALL or _torch.dual_depth() >= 0:
        return None
    rows = input.reshape(-1, prod(shape))
    normed, _, _ = normalized(rows, weight.reshape(-1), bias.reshape(-1), eps)
    return normed.reshape(input.shape)


@signed
class Normalized(Function):
    """Rows normalized, with weight and bias for each column; their means and scales."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, w.shape, w, b, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w, _, ctx.eps = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, w, mean, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, w, mean, scale = ctx.saved_tensors
        way = gradient if torch.is_grad_enabled() else Gradient.forward
        return *way(g, x, w, mean, scale, ctx.eps), None


@signed
class Gradient(Function):
    """The gradient of normalized rows, by the rows, the weight and the bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, w: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_all: tuple[Tensor, Tensor, Tensor] = _backward(
            g, x, w.shape, mean, scale, w, w, [True, True, True]
        )
        return by_all

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        way = _torchs if torch.is_grad_enabled() else _along
        return *way(*tensors, ctx.eps, dx, dw, db, asked=wanted(ctx)), None, None, None


def _along(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    mean: Tensor,
    scale: Tensor,
    eps: float,
    *directions: Tensor | None,
    asked: Sequence[bool],
) -> Three:
    """The derivatives of ``<directions, gradient(g, x, w)>`` by ``g``, ``x`` and ``w``, in as few passes as it takes."""
    dx, dw, db = directions
    x = x - mean  # also for products with it, in place of the normalized rows
    mean = torch.zeros_like(mean)
    by_g, by_x, by_w = db, None, None
    if dw is not None:
        by_g = torch.native_layer_norm(x, dw.shape, dw, db, eps)[0]
        by_x = _by_rows(g, x, mean, scale, dw) if asked[1] else None
    if dx is not None:
        moved = _by_rows(dx, x, mean, scale, None)
        by_g = moved * w if by_g is None else torch.addcmul(by_g, moved, w)
        by_w = (moved * g).sum(0) if asked[2] else None
        if asked[1]:
            slope, part = _by_rows(g, x, mean, scale, w), scale.square() * (-1 / w.shape[0])
            by_x = moved.new_zeros(()) if by_x is None else by_x
            for rows, weight in (
                (moved, torch.mv(g * x, w)[:, None]),
                (x, (dx * slope).sum(1, True)),
                (slope, (dx * x).sum(1, True)),
            ):
                by_x = torch.addcmul(by_x, rows, weight * part)
    if by_g is not None:
        by_g = by_g.expand_as(g)
    return by_g, by_x, by_w


def _by_rows(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, w: Tensor | None) -> Tensor:
    """The derivative of the normalized rows, a symmetric matrix for each, times that of ``w g``."""
    shape = x.shape[-1:]
    result: Tensor = _backward(g, x, shape, mean, scale, w, None, [True, False, False])[0]
    return result


def _torchs(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    mean: Tensor,
    scale: Tensor,
    eps: float,
    *directions: Tensor | None,
    asked: Sequence[bool],
) -> Three:
    """The same, to be differentiated further."""
    g, x, w = (t.view_as(t) for t in (g, x, w))  # the first depends on the others
    results = Gradient.forward(g, x, w, mean, scale, eps)
    ways = [(r, d) for r, d in zip(results, directions, strict=True) if d is not None]
    inputs = [t for t in (g, x, w) if t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [r for r, _ in ways], inputs, [d for _, d in ways], create_graph=True, allow_unused=True
        )
    )
    by_g, by_x, by_w = (next(found) if t.requires_grad else None for t in (g, x, w))
    return by_g, by_x, by_w


normalized: Callable[..., tuple[Tensor, Tensor, Tensor]] = Normalized.apply
gradient: Callable[..., tuple[Tensor, Tensor, Tensor]] = Gradient.apply

NORMALIZATION: dict[Callable[..., Any], Callable[..., Tensor | None]] = {F.layer_norm: layer_norm}
