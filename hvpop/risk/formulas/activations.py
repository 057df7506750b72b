"""Activations whose second derivative is in closed form, in as few passes as it takes.

An elementwise function's gradient is ``g f'(x)``; of its derivatives, by ``g`` and by ``x``, the first is made by
the same kernel and the second is ``u g f''(x)``. torch composes ``f''`` of a dozen passes over the numbers, each
into new memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ... import _torch
from ...graph import signed, wanted
from .convolutions import is_ordinary

SMALL = 2**18
"""Numbers below which torch's own way is taken: there the calls from Python cost more than the passes save. Times of
a kept and of a live product of an activation, relative to torch's (float32, one thread of a CPU; the five below):
0.50 to 1.14 and 0.84 to 1.47 at 2**16, 0.41 to 0.86 and 0.67 to 1.07 at 2**18, 0.15 to 0.91 and 0.28 to 0.89 at 2**20."""

SMALL_ON_A_GPU = 2**25
"""The same for a GPU. The same times on an H200: 0.85 to 1.30 and 1.22 to 2.13 up to 2**22, 0.66 to 1.02 and 0.74 to 1.65
at 2**24, 0.64 to 1.00 and 0.52 to 1.06 at 2**26."""

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function. No tuple: functorch would take that apart."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    """``slope(g, z)``: the gradient ``g f'``; z is the value where `by_value`, else the argument."""
    bend: Callable[[Tensor], Tensor]
    """``bend(z)``: the derivative of ``f'`` by z."""
    by_value: bool = False


@signed
class Applied(Function):
    """The values of an activation."""

    generate_vmap_rule = True
    entrywise = True
    """Its derivative multiplies each entry by a number."""

    @staticmethod
    def forward(x: Tensor, kind: Activation) -> Tensor:
        return kind.value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.kind = inputs
        ctx.save_for_backward(output if ctx.kind.by_value else x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        way = gradient if torch.is_grad_enabled() else Gradient.forward
        return way(g, z, ctx.kind), None


@signed
class Gradient(Function):
    """``g f'``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, z: Tensor, kind: Activation) -> Tensor:
        return kind.slope(g, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, z, ctx.kind = inputs
        ctx.save_for_backward(g, z)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g, z = ctx.saved_tensors
        asked, kind = wanted(ctx), ctx.kind
        if torch.is_grad_enabled():
            by_g = gradient(u, z, kind) if asked[0] else None
            return by_g, u * g * _torchs(z, kind) if asked[1] else None, None
        by_g = kind.slope(u, z) if asked[0] else None
        return by_g, (u * g).mul_(kind.bend(z)) if asked[1] else None, None


def _torchs(z: Tensor, kind: Activation) -> Tensor:
    """`Activation.bend`, to be differentiated further."""
    z, ones = z if z.requires_grad else z.detach().requires_grad_(), torch.ones_like(z)
    with torch.enable_grad():
        slope = kind.slope(ones, z) if kind.by_value else _derivative(kind.value(z), z, ones)
        return _derivative(slope, z, ones)


def _derivative(y: Tensor, x: Tensor, g: Tensor) -> Tensor:
    (by_x,) = torch.autograd.grad(y, x, g, create_graph=True)
    return by_x


def _of_tanh(y: Tensor) -> Tensor:
    return y.mul(-2)


def _of_sigmoid(y: Tensor) -> Tensor:
    return torch.sub(1, y, alpha=2)


def _of_silu(x: Tensor) -> Tensor:
    """``s (1 - s) (2 + x (1 - 2 s))`` for ``s = sigmoid(x)``."""
    s = x.sigmoid()
    bend: Tensor = aten.sigmoid_backward(torch.addcmul(x, x, s, value=-2).add_(2), s)
    return bend


def _of_gelu(x: Tensor) -> Tensor:
    """``2 q exp(q - 1) / sqrt(2 pi)`` for ``q = 1 - x^2 / 2``."""
    q = torch.addcmul(x.new_ones(()), x, x, value=-0.5)
    return q.exp().mul_(q).mul_(math.sqrt(2 / math.pi) / math.e)


def _of_tanh_gelu(x: Tensor) -> Tensor:
    """``(1 - t^2) (2 w - k - x w^2 t)`` for ``t = tanh(k x + c x^3)`` and ``w = k + 3 c x^2``.

    ``|t| = 1 - 2 m`` with ``m = sigmoid(-2 |k x + c x^3|)``: so ``1 - t^2`` is as exact where it is small, and what
    it multiplies first does not overflow.
    """
    k = math.sqrt(2 / math.pi)
    c = 0.044715 * k
    squares, size = x * x, x.abs()
    m = squares.mul(-2 * c).sub_(2 * k).mul_(size).sigmoid_()
    w = squares.mul_(3 * c).add_(k)
    quarter = torch.addcmul(m, m, m, value=-1)  # of 1 - t^2
    last = size.mul_(quarter).mul_(w).mul_(m.mul_(-2).add_(1))
    return quarter.mul_(w.mul(2).sub_(k)).addcmul_(last, w, value=-1).mul_(4)


TANH = Activation(torch.tanh, aten.tanh_backward, _of_tanh, by_value=True)
SIGMOID = Activation(torch.sigmoid, aten.sigmoid_backward, _of_sigmoid, by_value=True)
SILU = Activation(F.silu, aten.silu_backward, _of_silu)
GELU = Activation(F.gelu, aten.gelu_backward, _of_gelu)
TANH_GELU = Activation(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    _of_tanh_gelu,
)


def _applied(kind: Activation, input: Tensor) -> Tensor | None:
    """None where torch's own way is taken: few numbers, forward mode."""
    few = input.numel() < (SMALL_ON_A_GPU if input.is_cuda else SMALL)
    if few or not is_ordinary(input) or _torch.dual_depth() >= 0:
        return None
    return applied(input, kind)


def tanh(input: Tensor) -> Tensor | None:
    return _applied(TANH, input)


def sigmoid(input: Tensor) -> Tensor | None:
    return _applied(SIGMOID, input)


def silu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else _applied(SILU, input)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor | None:
    kind = {"none": GELU, "tanh": TANH_GELU}.get(approximate)
    return None if kind is None else _applied(kind, input)


applied: Callable[[Tensor, Activation], Tensor] = Applied.apply
gradient: Callable[[Tensor, Tensor, Activation], Tensor] = Gradient.apply

ACTIVATIONS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.tanh: tanh,
    Tensor.tanh: tanh,
    F.tanh: tanh,
    torch.sigmoid: sigmoid,
    Tensor.sigmoid: sigmoid,
    F.sigmoid: sigmoid,
    F.silu: silu,
    F.gelu: gelu,
}
