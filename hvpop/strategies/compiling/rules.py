"""Rules: what each ATen operation does to a sum. None stands for "nothing special"."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .sums import Scalar, Sum, Term, Value, Writer, aten, broadcast, divided, shape_of

Rule = Callable[..., Value | None]
"""``rule(writer, node, *args, **kwargs)``: the old node, and its arguments in the new graph."""


# -- element-wise arithmetic -------------------------------------------------------------------------


def _add(w: Writer, node: fx.Node, a: Any, b: Any, *, alpha: Scalar = 1) -> Value | None:
    shape = shape_of(node)
    if _is_zero(a) or _is_zero(b):
        return replace(w.scaled(b, alpha) if _is_zero(a) else w.sum_of(a), shape=shape)
    if not (w.varies(a) and w.varies(b) and _alike(node, *node.args)):
        return None
    return w.plus(shape, w.sum_of(a).terms + w.scaled(b, alpha).terms)


def _sub(w: Writer, node: fx.Node, a: Any, b: Any, *, alpha: Scalar = 1) -> Value | None:
    return _add(w, node, a, b, alpha=-alpha)


def _neg(w: Writer, node: fx.Node, a: Value) -> Value:
    return w.scaled(a, -1)


def _mul(w: Writer, node: fx.Node, a: Any, b: Any) -> Value | None:
    if not _alike(node, *node.args):
        return None
    if not w.varies(a):
        a, b = b, a
    if isinstance(b, fx.Node) and not w.varies(b):
        return w.times(a, b)
    return w.scaled(a, b) if isinstance(b, Scalar) else None


def _div(w: Writer, node: fx.Node, a: Any, b: Any) -> Value | None:
    if w.varies(b) or not _alike(node, *node.args):
        return None
    if isinstance(b, fx.Node):
        return w.times(a, w.call(aten.reciprocal.default, b))
    return w.scaled(a, 1 / b) if isinstance(b, Scalar) else None


def _chain(w: Writer, node: fx.Node, grad: Value, *rest: Any) -> Value | None:
    """Backward of an element-wise function: the gradient times a derivative that v does not touch."""
    if w.varies(rest) or not _alike(node, node.args[0]):
        return None
    return w.times(grad, w.call(node.target, _constant(w, aten.ones.default, node), *rest))


def _softmax_backward(
    w: Writer, node: fx.Node, grad: Value, y: fx.Node, dim: int, dtype: torch.dtype
) -> Value | None:
    """``y g - y sum(y g)``."""
    if w.varies(y) or not _alike(node, *node.args[:2]):
        return None
    weighted = w.written(w.times(grad, y))
    total = w.call(aten.sum.dim_IntList, weighted, [dim], True)
    return Sum(shape_of(node), (Term(1, None, weighted), Term(-1, y, total)))


def _log_softmax_backward(
    w: Writer, node: fx.Node, grad: Value, y: fx.Node, dim: int, dtype: torch.dtype
) -> Value | None:
    """``g - exp(y) sum(g)``."""
    if w.varies(y) or not _alike(node, *node.args[:2]):
        return None
    whole = w.written(grad)
    total = w.call(aten.sum.dim_IntList, whole, [dim], True)
    return Sum(shape_of(node), (Term(1, None, whole), Term(-1, w.call(aten.exp.default, y), total)))


def _copy(w: Writer, node: fx.Node, a: Value, **options: Any) -> Value | None:
    return a if _alike(node, node.args[0]) else None


def _zeros_like(w: Writer, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    return _constant(w, aten.zeros.default, node)


# -- changes of shape ----------------------------------------------------------------------------------


def _expand(w: Writer, node: fx.Node, a: Value, size: Any, **_: Any) -> Value:
    return replace(w.sum_of(a), shape=shape_of(node))


def _reshape(w: Writer, node: fx.Node, a: Value, *_: Any) -> Value:
    shape = list(shape_of(node))

    def view(x: fx.Node) -> fx.Node:
        while x.target is aten.reshape.default:
            x = x.args[0]  # type: ignore[assignment]
        return x if list(shape_of(x)) == shape else w.call(aten.reshape.default, x, shape)

    return _moved(w, a, view)


def _permute(w: Writer, node: fx.Node, a: Value, *dims: Any) -> Value:
    ndim = len(shape_of(node))
    order = list(range(ndim))
    if node.target is aten.permute.default:
        order = [d % ndim for d in dims[0]]
    elif ndim > 1:
        i, j = (d % ndim for d in dims) if dims else (0, 1)
        order[i], order[j] = order[j], order[i]

    def view(x: fx.Node) -> fx.Node:
        rewritten = None
        if order == _flipped(ndim) and len(node.args[0].users) == 1:  # type: ignore[union-attr]
            rewritten = _transposed_product(w, x)
        elif order == _swapped(ndim):
            rewritten = _weight_gradient(w, x)
        return rewritten or _permuted(w, x, order)

    return _moved(w, a, view)


def _moved(w: Writer, a: Value, view: Callable[[fx.Node], fx.Node]) -> Value:
    """A change of shape goes through a single term that fills its shape; others are computed first."""
    total = w.sum_of(a)
    term = total.single
    if term is None:
        return view(w.written(total))
    atom = view(term.atom)
    factor = None if term.factor is None else view(term.factor)
    return Sum(shape_of(atom), (Term(term.scale, factor, atom),))


def _permuted(w: Writer, x: fx.Node, order: list[int]) -> fx.Node:
    while x.target is aten.permute.default:
        order = [x.args[1][d] for d in order]  # type: ignore[index]
        x = x.args[0]  # type: ignore[assignment]
    return x if order == sorted(order) else w.call(aten.permute.default, x, order)


def _flipped(ndim: int) -> list[int]:
    """Last two axes exchanged."""
    return [*range(ndim - 2), ndim - 1, ndim - 2]


def _swapped(ndim: int) -> list[int]:
    """First two axes exchanged."""
    return [1, 0, *range(2, ndim)]


# -- products ------------------------------------------------------------------------------------------


def _linear(w: Writer, node: fx.Node, *args: Any, **kwargs: Any) -> Value | None:
    """An operation linear in each operand: a number in front of the operand goes in front of it."""
    varying = [i for i, a in enumerate(args) if w.varies(a)]
    position = varying[0]
    if len(varying) != 1 or not isinstance(args[position], Sum):
        return None
    term = args[position].single
    if term is None or term.factor is not None:
        return None
    plain = [*args[:position], term.atom, *args[position + 1 :]]
    return w.scaled(w.call(node.target, *plain, **kwargs), term.scale)


def _sum(
    w: Writer, node: fx.Node, a: Value, dims: list[int], keepdim: bool = False, **kwargs: Any
) -> Value | None:
    """A sum: the parts of the factor that are constant along the summed axes go in front of it."""
    total = w.sum_of(a)
    term = total.single
    if term is None or term.factor is None or kwargs or not dims:
        return _linear(w, node, a, dims, keepdim, **kwargs)
    ndim = len(total.shape)
    kept = [1 if i in {d % ndim for d in dims} else n for i, n in enumerate(total.shape)]
    scale, factor, in_front = term.scale, term.factor, []
    while True:
        large, small = divided(factor)
        if isinstance(small, Scalar):
            scale *= small
        elif small is not None and broadcast(shape_of(small), kept) == tuple(kept):
            in_front.append(small)
        else:
            break
        factor = large
    product = w.call(aten.mul.Tensor, term.atom, factor)
    result: Value = w.call(aten.sum.dim_IntList, product, dims, True)
    for small in in_front:
        result = w.times(result, small)
    return _reshape(w, node, w.scaled(result, scale))


def _transposed_product(w: Writer, x: fx.Node) -> fx.Node | None:
    """``(A B)^T`` as ``B^T A^T``, which BLAS reads as it lies and writes in order."""
    if x.target not in (aten.mm.default, aten.bmm.default):
        return None
    left, right = (_permuted(w, side, _flipped(len(shape_of(side)))) for side in x.args)  # type: ignore[arg-type]
    return w.call(x.target, right, left)


def _weight_gradient(w: Writer, x: fx.Node) -> fx.Node | None:
    """The gradient of a convolution's weight, which double backward writes as another convolution.

    That one sums over the batch as if it were channels; the kernel made for the purpose takes half
    the time or less.
    """
    if x.target is not aten.convolution.default:
        return None
    batch, grad, bias, dilation, padding, stride, transposed, output_padding, groups = x.args
    if bias is not None or transposed or groups != 1:
        return None
    swapped = _swapped(len(shape_of(x)))
    sources = [_source(side, swapped) for side in (batch, grad)]
    if None in sources:
        return None
    batch, grad = sources
    kernel = [*shape_of(x)[1::-1], *shape_of(x)[2:]]
    return _gradient_of_weight(
        w, grad, batch, kernel, stride, padding, dilation, False, output_padding, groups
    )


def _source(x: fx.Node, order: list[int]) -> fx.Node | None:
    """What ``x`` is a transposition of."""
    if x.target is aten.permute.default and list(x.args[1]) == order:  # type: ignore[arg-type]
        return x.args[0]  # type: ignore[return-value]
    if x.target is aten.transpose.int and sorted(x.args[1:]) == [0, 1] and order[:2] == [1, 0]:  # type: ignore[type-var]
        return x.args[0]  # type: ignore[return-value]
    return None


def _gradient_of_weight(
    w: Writer, grad: fx.Node, batch: fx.Node, kernel: list[int], *options: Any
) -> fx.Node | None:
    stride, padding, dilation, *_ = options
    sizes = zip(shape_of(batch)[2:], kernel[2:], stride, padding, dilation, strict=True)
    swept = tuple((n + 2 * p - d * (k - 1) - 1) // t + 1 for n, k, t, p, d in sizes)
    if swept != shape_of(grad)[2:]:
        return None
    like = grad.meta["val"]
    weight = w.call(aten.zeros.default, kernel, dtype=like.dtype, device=like.device)
    arguments = (grad, batch, weight, None, *options, [False, True, False])
    return w.call(operator.getitem, w.call(aten.convolution_backward.default, *arguments), 1)


def _slice(w: Writer, node: fx.Node, a: Value, dim: int = 0, *bounds: Any) -> Value | None:
    """A part of the taps of a weight gradient: the others are not computed."""
    if isinstance(a, fx.Node) and a.target is operator.getitem and a.args[1] == 1:
        grad, batch, _, _, *options, mask = a.args[0].args  # type: ignore[union-attr]
        is_gradient = a.args[0].target is aten.convolution_backward.default  # type: ignore[union-attr]
        if is_gradient and mask == [False, True, False] and dim > 1 and bounds[:1] == (0,):
            return _gradient_of_weight(w, grad, batch, list(shape_of(node)), *options)  # type: ignore[arg-type]
    return _linear(w, node, a, dim, *bounds)


# -- helpers and tables ----------------------------------------------------------------------------------


def _alike(node: fx.Node, *operands: Any) -> bool:
    """Whether all tensors have the node's dtype and device, so that arithmetic can be regrouped."""
    like = node.meta["val"]
    values = [operand.meta["val"] for operand in operands if isinstance(operand, fx.Node)]
    return all((val.dtype, val.device) == (like.dtype, like.device) for val in values)


def _is_zero(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target in (
        aten.zeros.default,
        aten.zeros_like.default,
    )


def _constant(w: Writer, target: Any, node: fx.Node) -> fx.Node:
    like = node.meta["val"]
    return w.call(target, list(like.shape), dtype=like.dtype, device=like.device)


_COPIES = (
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
)
_CHAIN = (
    aten.elu_backward.default,
    aten.gelu_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default,
    aten.log_sigmoid_backward.default,
    aten.mish_backward.default,
    aten.native_dropout_backward.default,
    aten.sigmoid_backward.default,
    aten.silu_backward.default,
    aten.softplus_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
)
_RESHAPES = (
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view.default,
)
_PERMUTES = (aten.permute.default, aten.t.default, aten.transpose.int)
_LINEAR = (
    aten.bmm.default,
    aten.convolution.default,
    aten.index_select.default,
    aten.mm.default,
    aten.select.int,
)

ELEMENTWISE: dict[Any, Rule] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.neg.default: _neg,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.expand.default: _expand,
    aten.zeros_like.default: _zeros_like,
    **dict.fromkeys(_COPIES, _copy),
    **dict.fromkeys(_CHAIN, _chain),
}
"""These take any sum as it is."""

THROUGH: dict[Any, Rule] = {
    aten.sum.dim_IntList: _sum,
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_PERMUTES, _permute),
}
"""These take a single term as it is."""

RULES: dict[Any, Rule] = {
    **ELEMENTWISE,
    **THROUGH,
    aten.slice.Tensor: _slice,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    **dict.fromkeys(_LINEAR, _linear),
}
