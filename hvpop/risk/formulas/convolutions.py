"""Convolutions whose second derivatives are convolutions of the same kind.

A convolution is bilinear: with a gradient of its output it makes the number ``<g, conv(x, w)>``,
linear in each of the three. Its derivatives of any order are that form with one tensor left out,
and torch has a good kernel for each: the convolution, the transposed convolution and the gradient
of a weight. torch's own double backward convolves images with images as large as they are instead,
and walks through groups one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...graph import signed, wanted

SMALL = 2**24
"""Multiplications (of one forward pass) below which torch's own way is taken: there the calls from
Python cost more than the kernels save. Time of a kept and of a live product of a 3x3 layer, relative
to torch's (float32, one thread of a CPU): 1.16 and 1.25 at 2**20, 1.00 and 1.01 at 2**24, 0.85 and
0.91 at 2**27. With groups it always pays: 0.44 and 0.65 at 2**19 with 32 of them, 0.03 and 0.04 at
2**25 with 64 on an H200."""

SMALL_ON_A_GPU = 2**16
"""The same for a GPU, as a number of places: those of all images at which the kernel is applied. What
torch wastes there grows with the images, not with the channels. The same times on an H200: 1.39 and
1.57 at 2**13, 0.99 and 1.21 at 2**15, 0.78 and 1.04 at 2**16, 0.45 and 0.70 at 2**17."""

INPUT, WEIGHT, OUTPUT = range(3)
"""The roles of the tensors in the form."""

OTHERS = {INPUT: (WEIGHT, OUTPUT), WEIGHT: (INPUT, OUTPUT), OUTPUT: (INPUT, WEIGHT)}
"""The roles of the two that a derivative by the third is made of."""


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


def partial_derivative(a: Tensor, b: Tensor, role: int, geometry: Geometry) -> Tensor:
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


@signed
class PartialDerivative(Function):
    """`partial_derivative` with derivatives by both tensors, in any mode and of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, role: int, geometry: Geometry) -> Tensor:
        return partial_derivative(a, b, role, geometry)

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
        asked = wanted(ctx)

        def by(role: int, given: dict[int, Tensor]) -> Tensor:
            derivative = tracked if torch.is_grad_enabled() else partial_derivative
            left, right = (given[other] for other in OTHERS[role])
            return derivative(left, right, role, ctx.geometry)

        by_a = by(first, {ctx.role: h, second: b}) if asked[0] else None
        by_b = by(second, {ctx.role: h, first: a}) if asked[1] else None
        return by_a, by_b, None, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *_: None) -> Tensor | None:
        a, b = ctx.saved_tensors
        by_a = None if da is None else tracked(da, b, ctx.role, ctx.geometry)
        by_b = None if db is None else tracked(a, db, ctx.role, ctx.geometry)
        return by_a if by_b is None else by_b if by_a is None else by_a + by_b


tracked: Callable[[Tensor, Tensor, int, Geometry], Tensor] = PartialDerivative.apply
"""`partial_derivative`, seen by autograd."""


def convolution(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """For ``conv1d``, ``conv2d`` and ``conv3d``; None where torch's own way is as good."""
    stride, dilation = _per_axis(stride, axes), _per_axis(dilation, axes)
    if isinstance(padding, str):
        around = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=False)]
        if padding == "valid":
            around = [0] * axes
        elif padding != "same" or any(n % 2 for n in around) or set(stride) != {1}:
            return None
        padding = [n // 2 for n in around]
    padding = _per_axis(padding, axes)
    options = Options(stride, padding, dilation, False, [0] * axes, groups)
    return _applied(input, weight, bias, options)


def transposed_convolution(
    axes: int,
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
    stride, padding, dilation, output_padding = (
        _per_axis(each, axes) for each in (stride, padding, dilation, output_padding)
    )
    if any(more >= step for more, step in zip(output_padding, stride, strict=False)):
        return None  # possible with a dilation; its transpose has rows too many
    options = Options(stride, padding, dilation, True, output_padding, groups)
    return _applied(input, weight, bias, options)


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    given = list(value) if isinstance(value, Sequence) else [value]
    return given * axes if len(given) == 1 else given


def _applied(input: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor | None:
    axes = len(options.stride)
    if not (input.dim() == weight.dim() == axes + 2 and is_ordinary(input, weight, bias)):
        return None
    channels = weight.shape[1] * options.groups if options.transposed else weight.shape[0]
    if bias is not None and bias.shape != (channels,):
        return None
    if 0 in (*input.shape, *weight.shape, *options.stride):
        return None
    places = input.shape[0] * prod(input.shape[2:])
    if not options.transposed:
        places //= prod(options.stride)
    if not _pays(places, weight.shape, options.groups, on_gpu=input.is_cuda):
        return None
    result = tracked(input, weight, OUTPUT, Geometry(input.shape, weight.shape, options))
    return result if bias is None else result + bias.reshape(-1, *[1] * axes)


def _pays(places: int, weight: torch.Size, groups: int, *, on_gpu: bool) -> bool:
    """Whether it is faster than torch's own way, for a kernel applied at so many places."""
    if groups > 1:
        return True
    if prod(weight[2:]) == 1:
        return False  # torch multiplies matrices then
    return places >= SMALL_ON_A_GPU if on_gpu else places * prod(weight) >= SMALL


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Floating point numbers of one type, as they lie in memory, that nothing will convert."""
    given = [t for t in tensors if t is not None]
    first = given[0]
    device = first.device.type
    return (
        first.is_floating_point()
        and all(t.dtype == first.dtype and t.layout == torch.strided for t in given)
        and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
    )


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.conv1d: partial(convolution, 1),
    F.conv2d: partial(convolution, 2),
    F.conv3d: partial(convolution, 3),
    F.conv_transpose1d: partial(transposed_convolution, 1),
    F.conv_transpose2d: partial(transposed_convolution, 2),
    F.conv_transpose3d: partial(transposed_convolution, 3),
}
