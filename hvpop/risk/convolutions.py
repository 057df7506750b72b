"""Convolutions whose second derivatives are convolutions of the same kind.

A convolution is bilinear: with a gradient of its output it makes the number ``<g, conv(x, w)>``,
linear in each of the three. Its derivatives of any order are that form with one tensor left out,
and torch has a good kernel for each: the convolution, the transposed convolution and the gradient
of a weight. torch's own double backward convolves images with images as large as they are instead,
and walks through groups one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

SMALL = {"cpu": 2**24, "cuda": 2**28}
"""Multiplications (one forward pass, by device) below which torch's own way is taken: there the
calls from Python cost more than the kernels save. Kept and live product of a 3x3 layer, to torch's,
float32: 1.16 and 1.25 at 2**20, 1.00 and 1.01 at 2**24, 0.85 and 0.91 at 2**27 on a CPU; 1.14 and
1.37 at 2**25, 0.64 and 1.03 at 2**28, 0.33 and 0.49 at 2**32 on an H200. With groups it always
pays: 0.44 and 0.65 at 2**19 with 32 of them, 0.02 and 0.03 at 2**25 with 64 on the H200."""

INPUT, WEIGHT, OUTPUT = range(3)

Roles = tuple[int, int, int]  # of the tensor left out, and of the two given


class Geometry(NamedTuple):
    """What a convolution is beside its tensors."""

    input: torch.Size
    weight: torch.Size
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def contracted(a: Tensor, b: Tensor, roles: Roles, geometry: Geometry) -> Tensor:
    """The derivative of ``<g, conv(x, w)>`` by one of x, w and g, given the two others."""
    left_out, first, second = roles
    if first > second:
        a, b = b, a
    options = geometry[2:]
    if left_out == OUTPUT:
        return torch.convolution(a, b, None, *options)
    if left_out == INPUT:
        return torch.convolution(b, a, None, *_transposed(geometry, b.shape))
    any_weight = a.new_empty(()).expand(geometry.weight)  # only its shape is read
    by_weight: Tensor = torch.ops.aten.convolution_backward(
        b, a, any_weight, None, *options, [False, True, False]
    )[1]
    return by_weight


def _transposed(geometry: Geometry, output: torch.Size) -> tuple[Any, ...]:
    """The options of the convolution that is the transpose of another."""
    _, _, stride, padding, dilation, transposed, _, groups = geometry
    missing = [0] * len(stride)
    if not transposed:  # what the stride has passed over at the end
        shapes = geometry.input[2:], output[2:], geometry.weight[2:]
        sizes = zip(*shapes, stride, padding, dilation, strict=True)
        missing = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
    return stride, padding, dilation, not transposed, missing, groups


class Contraction(Function):
    """`contracted`, to be differentiated by both tensors, in any mode and as often as wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, roles: Roles, geometry: Geometry) -> Tensor:
        return contracted(a, b, roles, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.roles, ctx.geometry = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if h is None:
            return None, None, None, None
        (left_out, first, second), (a, b) = ctx.roles, ctx.saved_tensors
        form = differentiable if torch.is_grad_enabled() else contracted
        wanted, geometry = ctx.needs_input_grad, ctx.geometry
        by_a = form(h, b, (first, left_out, second), geometry) if wanted[0] else None
        by_b = form(h, a, (second, left_out, first), geometry) if wanted[1] else None
        return by_a, by_b, None, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *_: None) -> Tensor | None:
        a, b = ctx.saved_tensors
        by_a = None if da is None else differentiable(da, b, ctx.roles, ctx.geometry)
        by_b = None if db is None else differentiable(a, db, ctx.roles, ctx.geometry)
        return by_a if by_b is None else by_b if by_a is None else by_a + by_b


differentiable: Callable[[Tensor, Tensor, Roles, Geometry], Tensor] = Contraction.apply

# torch asks for the signature at each call; finding it takes as long as a small convolution.
Contraction.forward.__signature__ = inspect.signature(Contraction.forward)  # type: ignore[attr-defined]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """For ``conv1d``, ``conv2d`` and ``conv3d``; None where torch's own way is as good."""
    axes = weight.dim() - 2
    steps = _per_axis(stride, axes), _per_axis(dilation, axes)
    if isinstance(padding, str):
        around = [d * (k - 1) for d, k in zip(steps[1], weight.shape[2:], strict=False)]
        if padding != "same" or any(n % 2 for n in around) or set(steps[0]) != {1}:
            return None
        padding = [n // 2 for n in around]
    options = steps[0], _per_axis(padding, axes), steps[1], False, [0] * axes, groups
    return _applied(input, weight, bias, Geometry(input.shape, weight.shape, *options))


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor | None:
    """For ``conv_transpose1d``, ``conv_transpose2d`` and ``conv_transpose3d``."""
    axes = weight.dim() - 2
    stride, padding, dilation, output_padding = (
        _per_axis(each, axes) for each in (stride, padding, dilation, output_padding)
    )
    if any(more >= step for more, step in zip(output_padding, stride, strict=False)):
        return None  # possible with a dilation; its transpose has rows too many
    options = stride, padding, dilation, True, output_padding, groups
    return _applied(input, weight, bias, Geometry(input.shape, weight.shape, *options))


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    given = list(value) if isinstance(value, Sequence) else [value]
    return given * axes if len(given) == 1 else given


def _applied(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor | None:
    if not _pays(input, weight, geometry) or not _is_ordinary(input, weight, bias):
        return None
    result = differentiable(input, weight, (OUTPUT, INPUT, WEIGHT), geometry)
    return result if bias is None else result + bias.reshape(-1, *[1] * len(geometry.stride))


def _pays(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    if input.dim() != weight.dim() or 0 in (*input.shape, *weight.shape, *geometry.stride):
        return False
    if geometry.groups > 1:
        return True
    work = input.numel() * weight.numel() // input.shape[1]
    if not geometry.transposed:
        work //= prod(geometry.stride)
    one_pixel = prod(weight.shape[2:]) == 1  # torch multiplies matrices then
    small = SMALL.get(input.device.type, SMALL["cpu"])
    return work >= small and not one_pixel


def _is_ordinary(*tensors: Tensor | None) -> bool:
    """Floating point numbers of one type, as they lie in memory, that nothing will convert."""
    given = [t for t in tensors if t is not None]
    first = given[0]
    return (
        first.is_floating_point()
        and all(t.dtype == first.dtype and t.layout == torch.strided for t in given)
        and not torch.is_autocast_enabled(first.device.type)
    )


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.conv_transpose1d: transposed_convolution,
    F.conv_transpose2d: transposed_convolution,
    F.conv_transpose3d: transposed_convolution,
}
