"""Rules: what ATen operations do to values not computed yet. None stands for "nothing special"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .convolutions import fewer_taps
from .sums import (
    Scalar,
    Sum,
    Term,
    Value,
    Writer,
    args_of,
    aten,
    broadcast,
    divided,
    is_zero_there,
    shape_of,
    size_of,
)
from .views import expand, permute, reshape

Rule = Callable[..., Value | None]
"""``rule(writer, node, *args, **kwargs)``: the old node, and its arguments in the new graph."""


# -- element-wise arithmetic -------------------------------------------------------------------------


def _add(w: Writer, node: fx.Node, a: Any, b: Any, *, alpha: Scalar = 1) -> Value | None:
    shape = shape_of(node)
    if _is_zero(a) or _is_zero(b):
        return replace(w.scaled(b, alpha) if _is_zero(a) else w.sum_of(a), shape=shape)
    if not (w.varies(a) and w.varies(b) and _alike(node, *args_of(node))):
        return None
    return w.plus(shape, w.sum_of(a).terms + w.scaled(b, alpha).terms)


def _sub(w: Writer, node: fx.Node, a: Any, b: Any, *, alpha: Scalar = 1) -> Value | None:
    return _add(w, node, a, b, alpha=-alpha)


def _neg(w: Writer, node: fx.Node, a: Value) -> Value:
    return w.scaled(a, -1)


def _mul(w: Writer, node: fx.Node, a: Any, b: Any) -> Value | None:
    if not _alike(node, *args_of(node)):
        return None
    if not w.varies(a):
        a, b = b, a
    if isinstance(b, fx.Node) and not w.varies(b):
        return w.times(a, b)
    return w.scaled(a, b) if isinstance(b, Scalar) else None


def _div(w: Writer, node: fx.Node, a: Any, b: Any) -> Value | None:
    if w.varies(b) or not _alike(node, *args_of(node)):
        return None
    if isinstance(b, fx.Node):
        return w.times(a, w.call(aten.reciprocal.default, b))
    return w.scaled(a, 1 / b) if isinstance(b, Scalar) else None


def _chain(w: Writer, node: fx.Node, grad: Value, *rest: Any, **options: Any) -> Value | None:
    """Backward of an element-wise function: the gradient times a derivative that v does not touch."""
    if w.varies(rest) or not _alike(node, args_of(node)[0]):
        return None
    return w.times(
        grad, w.call(node.target, _constant(w, aten.ones.default, node), *rest, **options)
    )


def _masked(w: Writer, node: fx.Node, a: Value, mask: fx.Node, value: Scalar) -> Value | None:
    """Zeros put into a sum are zeros in its weights."""
    like, terms = node.meta["val"], w.sum_of(a).terms
    if value != 0 or w.varies(mask) or not _alike(node, args_of(node)[0]):
        return None
    if 4 * size_of(mask) > like.numel() and any(term.factor is None for term in terms):
        return None  # ones would take more memory than the mask
    ones = w.call(aten.ones.default, list(shape_of(mask)), dtype=like.dtype, device=like.device)

    def kept(term: Term) -> Term:
        factor = ones if term.factor is None else term.factor
        if not is_zero_there(factor, mask):
            factor = w.call(aten.masked_fill.Scalar, factor, mask, 0)
        return replace(term, factor=factor)

    return Sum(shape_of(node), tuple(kept(term) for term in terms))


def _softmax_backward(
    w: Writer, node: fx.Node, grad: Value, y: fx.Node, dim: int, dtype: torch.dtype
) -> Value | None:
    """``y g - y sum(y g)``, with a number in front of g in front of it."""
    if w.varies(y) or not _alike(node, *args_of(node)[:2]):
        return None
    whole = w.sum_of(grad)
    scales = {term.scale for term in whole.terms}
    scale = scales.pop() if len(scales) == 1 else 1
    if scale != 1:
        whole = replace(whole, terms=tuple(replace(term, scale=1) for term in whole.terms))
    weighted = w.written(w.times(whole, y))
    total = w.call(aten.sum.dim_IntList, weighted, [dim], True)
    result = Sum(shape_of(node), (Term(1, None, weighted), Term(-1, y, total)))
    return result if scale == 1 else w.scaled(w.written(result), scale)


def _log_softmax_backward(
    w: Writer, node: fx.Node, grad: Value, y: fx.Node, dim: int, dtype: torch.dtype
) -> Value | None:
    """``g - exp(y) sum(g)``."""
    if w.varies(y) or not _alike(node, *args_of(node)[:2]):
        return None
    whole = w.written(grad)
    total = w.call(aten.sum.dim_IntList, whole, [dim], True)
    return Sum(shape_of(node), (Term(1, None, whole), Term(-1, w.call(aten.exp.default, y), total)))


def _copy(w: Writer, node: fx.Node, a: Value, **options: Any) -> Value | None:
    return a if _alike(node, args_of(node)[0]) else None


def _overwrite(w: Writer, node: fx.Node, a: Value, b: Value, *_: Any) -> Value | None:
    if not _alike(node, args_of(node)[1]):
        return None
    if w.varies(b):
        return expand(w, node, b)
    return w.call(aten.expand.default, b, list(shape_of(node)))  # nothing of what was there is left


def _zeros_like(w: Writer, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    return _constant(w, aten.zeros.default, node)


# -- products ------------------------------------------------------------------------------------------


def _linear(w: Writer, node: fx.Node, *args: Any, **kwargs: Any) -> Value | None:
    """An operation linear in each operand: a number in front of the operand goes in front of it."""
    varying = [i for i, a in enumerate(args) if w.varies(a)]
    operand = args[varying[0]]
    term = operand.single if isinstance(operand, Sum) else None
    if len(varying) > 1 or term is None or term.factor is not None:
        return None
    plain = [term.atom if a is operand else a for a in args]
    return w.scaled(w.call(node.target, *plain, **kwargs), term.scale)


def _sum(
    w: Writer, node: fx.Node, a: Value, dims: list[int], keepdim: bool = False, **kwargs: Any
) -> Value | None:
    """A sum: the parts of the factor that are constant along the summed axes go in front of it."""
    term = w.sum_of(a).single
    if term is None or term.factor is None or kwargs or not dims:
        return _linear(w, node, a, dims, keepdim, **kwargs)
    shape = list(shape_of(term.atom))
    for d in dims:
        shape[d] = 1
    scale, factor, in_front = term.scale, term.factor, []
    while True:
        large, small = divided(factor)
        if isinstance(small, Scalar):
            scale *= small
        elif small is not None and broadcast(shape_of(small), shape) == tuple(shape):
            in_front.append(small)
        else:
            break
        factor = large
    product = w.call(aten.mul.Tensor, term.atom, factor)
    result: Value = w.call(aten.sum.dim_IntList, product, dims, True)
    for small in in_front:
        result = w.times(result, small)
    return reshape(w, node, w.scaled(result, scale))


def _slice(w: Writer, node: fx.Node, a: Value, dim: int = 0, *bounds: Any) -> Value | None:
    fewer = fewer_taps(w, node, a, dim, bounds[0]) if len(bounds) == 2 else None
    return fewer or _linear(w, node, a, dim, *bounds)


# -- helpers and tables ----------------------------------------------------------------------------------


def _alike(node: fx.Node, *operands: Any) -> bool:
    """Whether all tensors have the node's dtype and device, so that arithmetic can be regrouped."""
    like = node.meta["val"]
    values = [operand.meta["val"] for operand in operands if isinstance(operand, fx.Node)]
    return all((val.dtype, val.device) == (like.dtype, like.device) for val in values)


def _is_zero(value: Any) -> bool:
    while isinstance(value, fx.Node) and value.target in (*_RESHAPES, *_PERMUTES):
        value = args_of(value)[0]
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
    aten.expand.default: expand,
    aten.zeros_like.default: _zeros_like,
    aten.copy.default: _overwrite,
    aten.masked_fill.Scalar: _masked,
    **dict.fromkeys(_COPIES, _copy),
    **dict.fromkeys(_CHAIN, _chain),
}
"""These take any sum as it is."""

THROUGH: dict[Any, Rule] = {
    aten.sum.dim_IntList: _sum,
    aten._softmax_backward_data.default: _softmax_backward,
    **dict.fromkeys(_RESHAPES, reshape),
    **dict.fromkeys(_PERMUTES, permute),
}
"""These take a single term as it is."""

RULES: dict[Any, Rule] = {
    **ELEMENTWISE,
    **THROUGH,
    aten.slice.Tensor: _slice,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    **dict.fromkeys(_LINEAR, _linear),
}
