"""Views: changes of shape, pushed through a single term or cancelled against one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from .convolutions import weight_gradient
from .sums import Sum, Term, Value, Writer, args_of, aten, shape_of


def expand(w: Writer, node: fx.Node, a: Value, *_: Any, **__: Any) -> Value:
    return replace(w.sum_of(a), shape=shape_of(node))


def reshape(w: Writer, node: fx.Node, a: Value, *_: Any) -> Value:
    shape = list(shape_of(node))
    multiplied = all(user.target in _PRODUCTS for user in node.users)

    def view(x: fx.Node) -> fx.Node:
        while x.target is aten.reshape.default:
            x = args_of(x)[0]
        if list(shape_of(x)) == shape:
            return x
        if multiplied and _flips(x) and shape[-2:] == list(shape_of(x))[-2:]:
            # What is copied is copied in order: BLAS reads it transposed.
            return _flipped_back(w, w.call(aten.reshape.default, args_of(x)[0], _flip(shape)))
        return w.call(aten.reshape.default, x, shape)

    return _moved(w, a, view)


def permute(w: Writer, node: fx.Node, a: Value, *dims: Any) -> Value:
    """For ``permute``, ``transpose`` and ``t``."""
    ndim = len(shape_of(node))
    order = list(range(ndim))
    if node.target is aten.permute.default:
        order = [d % ndim for d in dims[0]]
    elif ndim > 1:
        i, j = (d % ndim for d in dims) if dims else (0, 1)
        order[i], order[j] = order[j], order[i]
    read_once = len(args_of(node)[0].users) == 1

    def view(x: fx.Node) -> fx.Node:
        special = None
        if order == _flipped(ndim) and read_once:
            special = _transposed_product(w, x)
        elif x.target is aten.stack.default and read_once:
            special = _stacked(w, x, order)
        elif order == [1, 0, *range(2, ndim)]:
            special = weight_gradient(w, x)
        return special or _permuted(w, x, order)

    return _moved(w, a, view)


def _moved(w: Writer, a: Value, view: Callable[[fx.Node], fx.Node]) -> Value:
    total = w.sum_of(a)
    term = total.single
    if term is None:
        return view(w.written(total))
    atom = view(term.atom)
    factor = None if term.factor is None else view(term.factor)
    return Sum(shape_of(atom), (Term(term.scale, factor, atom),))


def _permuted(w: Writer, x: fx.Node, order: list[int]) -> fx.Node:
    while x.target is aten.permute.default:
        x, inner = args_of(x)
        order = [inner[d] for d in order]
    return x if order == sorted(order) else w.call(aten.permute.default, x, order)


def _transposed_product(w: Writer, x: fx.Node) -> fx.Node | None:
    """``(A B)'`` as ``B' A'``, which BLAS reads as it lies and writes in order; so too of sums and other shapes of them."""
    if x.target in _PRODUCTS:
        left, right = (_flipped_back(w, side) for side in args_of(x))
        return w.call(x.target, right, left)
    parts = args_of(x)
    if any(len(part.users) > 1 for part in x.all_input_nodes):
        return None  # it would be multiplied twice
    if x.target is aten.reshape.default and shape_of(x)[-2:] == shape_of(parts[0])[-2:]:
        product = _transposed_product(w, parts[0])
        return product and w.call(aten.reshape.default, product, _flip(list(shape_of(x))))
    if x.target is aten.add.Tensor and [shape_of(p) for p in x.all_input_nodes] == 2 * [
        shape_of(x)
    ]:
        first, second = (_transposed_product(w, part) for part in parts)
        return first and second and w.call(aten.add.Tensor, first, second, **x.kwargs)
    return None


def _flipped_back(w: Writer, x: fx.Node) -> fx.Node:
    return _permuted(w, x, _flipped(len(shape_of(x))))


def _flips(x: fx.Node) -> bool:
    """Whether the node exchanges the last two axes of something."""
    return x.target is aten.permute.default and args_of(x)[1] == _flipped(len(shape_of(x)))


def _flip(shape: list[int]) -> list[int]:
    return [*shape[:-2], shape[-1], shape[-2]]


def _stacked(w: Writer, x: fx.Node, order: list[int]) -> fx.Node:
    """A stack laid out at once as it is read, in place of one that a reshape copies."""
    parts, *dims = args_of(x)
    along = dims[0] % len(order) if dims else 0
    inner = [d - (d > along) for d in order if d != along]
    return w.call(aten.stack.default, [_permuted(w, p, inner) for p in parts], order.index(along))


def _flipped(ndim: int) -> list[int]:
    """The order of axes with the last two exchanged."""
    return [*range(ndim - 2), ndim - 1, ndim - 2]


_PRODUCTS = (aten.mm.default, aten.bmm.default)
