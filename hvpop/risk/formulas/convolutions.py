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
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

SMALL = 2**24
"""Multiplications (of one forward pass) below which torch's own way is taken: there the calls from
Python cost more than the kernels save. Kept and live product of a 3x3 layer, to torch's, float32, one
thread of a CPU: 1.16 and 1.25 at 2**20, 1.00 and 1.01 at 2**24, 0.85 and 0.91 at 2**27. With groups
it always pays: 0.44 and 0.65 at 2**19 with 32 of them, 0.02 and 0.03 at 2**25 with 64 on an H200."""

SMALL_ON_A_GPU = 2**16
"""The same for GPUs, in places of all images where the kernel is laid: multiplications cost nothing
there, images as kernels do. On an H200: 1.39 and 1.57 at 2**13, 0.99 and 1.21 at 2**15, 0.78 and 1.04
at 2**16, 0.45 and 0.70 at 2**17."""

INPUT, WEIGHT, OUTPUT = range(3)
"""The roles of the tensors in the form."""

OTHERS = {INPUT: (WEIGHT, OUTPUT), WEIGHT: (INPUT, OUTPUT), OUTPUT: (INPUT, WEIGHT)}


Form = Callable[..., Tensor]  # (a, b, role, geometry) -> the derivative


class Options(NamedTuple):
    """As `torch.convolution` takes them, with one number for each axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


@dataclass(frozen=True)
class Geometry:
    """What a convolution is beside its tensors. No tuple: functorch would take that apart."""

    input: torch.Size
    weight: torch.Size
    options: Options

    def transpose(self, output: torch.Size) -> Options:
        """The options of the convolution that is the transpose of this one."""
        stride, padding, dilation, transposed, _, _ = self.options
        missing = [0] * len(stride)
        if not transposed:  # what the stride has passed over at the end
            shapes = self.input[2:], output[2:], self.weight[2:]
            sizes = zip(*shapes, stride, padding, dilation, strict=True)
            missing = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
        return self.options._replace(transposed=not transposed, output_padding=missing)


def contracted(a: Tensor, b: Tensor, role: int, geometry: Geometry) -> Tensor:
    """The derivative of ``<g, conv(x, w)>`` by the tensor of a role, given those of the `OTHERS`."""
    if role == OUTPUT:
        return torch.convolution(a, b, None, *geometry.options)
    if role == INPUT:
        return torch.convolution(b, a, None, *geometry.transpose(b.shape))
    any_weight = a.new_empty(()).expand(geometry.weight)  # only its shape is read
    by_weight: Tensor = torch.ops.aten.convolution_backward(
        b, a, any_weight, None, *geometry.options, [False, True, False]
    )[1]
    return by_weight


class Contraction(Function):
    """`contracted`, to be differentiated by both tensors, in any mode and as often as wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, role: int, geometry: Geometry) -> Tensor:
        return contracted(a, b, role, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.role, ctx.geometry = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if h is None:
            return None, None, None, None
        (first, second), (a, b) = OTHERS[ctx.role], ctx.saved_tensors
        wanted = ctx.needs_input_grad

        def by(role: int, given: dict[int, Tensor]) -> Tensor:
            form: Form = differentiable if torch.is_grad_enabled() else contracted
            return form(*(given[other] for other in OTHERS[role]), role, ctx.geometry)

        by_a = by(first, {ctx.role: h, second: b}) if wanted[0] else None
        by_b = by(second, {ctx.role: h, first: a}) if wanted[1] else None
        return by_a, by_b, None, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *_: None) -> Tensor | None:
        a, b = ctx.saved_tensors
        by_a = None if da is None else differentiable(da, b, ctx.role, ctx.geometry)
        by_b = None if db is None else differentiable(a, db, ctx.role, ctx.geometry)
        return by_a if by_b is None else by_b if by_a is None else by_a + by_b


differentiable: Form = Contraction.apply

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
    stride, dilation = _per_axis(stride, axes), _per_axis(dilation, axes)
    if isinstance(padding, str):
        around = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=False)]
        if padding != "same" or any(n % 2 for n in around) or set(stride) != {1}:
            return None
        padding = [n // 2 for n in around]
    padding = _per_axis(padding, axes)
    return _applied(
        input, weight, bias, Options(stride, padding, dilation, False, [0] * axes, groups)
    )


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
    return _applied(
        input, weight, bias, Options(stride, padding, dilation, True, output_padding, groups)
    )


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    given = list(value) if isinstance(value, Sequence) else [value]
    return given * axes if len(given) == 1 else given


def _applied(input: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor | None:
    if not _pays(input, weight, options) or not _is_ordinary(input, weight, bias):
        return None
    result = differentiable(input, weight, OUTPUT, Geometry(input.shape, weight.shape, options))
    return result if bias is None else result + bias.reshape(-1, *[1] * len(options.stride))


def _pays(input: Tensor, weight: Tensor, options: Options) -> bool:
    if input.dim() != weight.dim() or 0 in (*input.shape, *weight.shape, *options.stride):
        return False
    if options.groups > 1:
        return True
    if prod(weight.shape[2:]) == 1:
        return False  # torch multiplies matrices then
    steps = 1 if options.transposed else prod(options.stride)
    places = input.shape[0] * prod(input.shape[2:]) // steps
    if input.is_cuda:
        return places >= SMALL_ON_A_GPU
    return places * weight.numel() >= SMALL


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
