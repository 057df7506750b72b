"""Convolutions: the gradient of a convolution's weight, recognised and computed as such.

Double backward writes it as a convolution that sums over the batch as if it were channels, with
the stride and the dilation exchanged, and cuts off the taps in excess. The kernel made for the
purpose takes half the time or less.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .sums import Value, Writer, args_of, aten, shape_of

_WEIGHT_ONLY = [False, True, False]


def weight_gradient(w: Writer, x: fx.Node) -> fx.Node | None:
    """The transpose (first two axes) of ``x``, if that is the gradient of a weight."""
    if x.target is not aten.convolution.default:
        return None
    input, weight, bias, dilation, padding, stride, transposed, _, groups = args_of(x)
    batch, grad = _transposed(input), _transposed(weight)
    if batch is None or grad is None or bias is not None or transposed or groups != 1:
        return None
    shape = [*shape_of(x)[1::-1], *shape_of(x)[2:]]
    return _gradient(
        w, grad, batch, shape, stride, padding, dilation, False, [0] * len(stride), groups
    )


def fewer_taps(w: Writer, node: fx.Node, a: Value, dim: int, start: int) -> fx.Node | None:
    """``node``, if it takes the first taps only of a weight's gradient ``a``."""
    if not isinstance(a, fx.Node) or a.target is not operator.getitem or dim < 2 or start != 0:
        return None
    backward, which = args_of(a)
    if backward.target is not aten.convolution_backward.default or which != 1:
        return None
    grad, batch, _, _, *options, mask = args_of(backward)
    if mask != _WEIGHT_ONLY:
        return None
    return _gradient(w, grad, batch, list(shape_of(node)), *options)


def _gradient(
    w: Writer, grad: fx.Node, batch: fx.Node, shape: list[int], *options: Any
) -> fx.Node | None:
    stride, padding, dilation, *_ = options
    sizes = zip(shape_of(batch)[2:], shape[2:], stride, padding, dilation, strict=True)
    output = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    if output != shape_of(grad)[2:]:
        return None  # not what a weight of this shape makes of the batch
    like = grad.meta["val"]
    weight = w.call(aten.zeros.default, shape, dtype=like.dtype, device=like.device)
    arguments = (grad, batch, weight, None, *options, _WEIGHT_ONLY)
    return w.call(operator.getitem, w.call(aten.convolution_backward.default, *arguments), 1)


def _transposed(x: fx.Node) -> fx.Node | None:
    """The operand of an exchange of the first two axes."""
    if x.target is aten.permute.default:
        source, order = args_of(x)
        return source if order == [1, 0, *range(2, len(order))] else None
    if x.target is aten.transpose.int:
        source, *axes = args_of(x)
        return source if sorted(axes) == [0, 1] else None
    return None
