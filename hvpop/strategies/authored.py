"""Derivatives that the author of a function wrote: whether they can be differentiated once more.

The backward of a custom ``autograd.Function`` is right for a first derivative however it computes
it. A second one exists only if every step of it is an op of torch on what was saved, which no graph
shows: intermediates kept as numbers, attributes of ctx, NumPy, another evaluation without a graph all
look like constants. Only differences of gradients tell.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from .. import _torch
from ..exchange import Ungraded
from ..graph import is_alone, nodes_of
from .base import LinearMap, Params, ScalarFunction, at
from .finite_difference import first_gradient
from .graphs import NoSecondDerivativeError
from .referee import Difference, difference, generic, norm
from .rounding import rounding

NOTHING: frozenset[Any] = frozenset()


def authored(fn: ScalarFunction, loss: Tensor) -> frozenset[Any]:
    """The custom Functions behind a loss, and a word for hooks that ``fn`` tells of.

    A function that says that it is plain has none.
    """
    if getattr(fn, "plain", False):
        return NOTHING
    custom = (node for node in nodes_of([loss]) if isinstance(node, BackwardCFunction))
    functions = {_torch.function_of(node) for node in custom}
    found = {f for f in functions if not f.__module__.startswith("hvpop.")}
    return frozenset(found | {"hooks"} if getattr(fn, "hooked", False) else found)


def ungraded(fn: ScalarFunction, point: Params) -> AbstractContextManager[None]:
    """The parameters without ``.grad``, so that what is left in one shows; not where nothing can be."""
    return nullcontext() if getattr(fn, "plain", False) else Ungraded(point.values())


def refuse_hidden(strategy: object, fn: ScalarFunction, point: Params, loss: Tensor) -> None:
    """Raise where a gradient reaches the parameters past the graph of the loss."""
    if getattr(fn, "plain", False):
        return
    alone = is_alone(loss) or any(loss is p for p in point.values())
    if loss.requires_grad and loss.is_leaf and not alone:
        way = "the loss is a leaf, whose gradient some hook passes on"
    elif any(p.is_leaf and p.grad is not None for p in point.values()):
        way = "a backward pass inside the backward pass leaves gradients in the parameters"
    else:
        return
    raise NoSecondDerivativeError(
        f"{strategy!r}: {way}, so that there is no graph to differentiate again; "
        "strategy=FiniteDifference() needs first derivatives only"
    )


def hold_against_differences(
    strategy: object,
    fn: ScalarFunction,
    params: Params,
    args: tuple[object, ...],
    linear: LinearMap,
) -> None:
    """Raise if a product is not the derivative of the gradient, as far as differences can tell.

    They cannot near kinks, nor through a stop-gradient: there the gradient is not the derivative of
    the loss, by its author's will, and is differentiated as it is written.
    """
    w = generic(params)
    product = linear(w)
    if not all(bool(t.isfinite().all()) for t in product.values()):
        return  # somebody else's to tell
    try:
        truth = _difference(fn, params, args, w)
    except NoSecondDerivativeError:
        raise
    except Exception:  # a first derivative that fails where the graph did not: nothing to learn
        return
    off = _farthest(product, truth, params)
    if off is not None and _is_gradient_of_loss(fn, params, args):
        raise NoSecondDerivativeError(
            f"{strategy!r}: a custom autograd.Function's backward cannot be differentiated as it is "
            f"written: the product is off by {off:.0e} of what differences of gradients give; "
            "strategy=FiniteDifference() needs first derivatives only"
        )


def _difference(
    fn: ScalarFunction, params: Params, args: tuple[object, ...], v: Params
) -> Difference:
    """In double precision if the function can be evaluated in it."""
    doubled = in_double((params, args, v))
    try:
        return difference(lambda p: first_gradient(fn, p, doubled[1]), doubled[0], doubled[2])
    except Exception:  # a constant or a cast of the user's own holds on to its dtype
        return difference(lambda p: first_gradient(fn, p, args), params, v)


def _farthest(product: Params, truth: Difference, params: Params) -> float | None:
    """How far the worst parameter is off, relative, if that is beyond all doubt.

    Each on its own scale, but none on a smaller one than what rounding leaves of the largest.
    """
    eps = rounding([*params.values(), *product.values()])
    total = norm(truth.product)
    worst = None
    for name, right in truth.product.items():
        off = float((product[name].double() - right).norm())
        size = max(float(right.norm()), float(product[name].double().norm()))
        if off > max(10 * truth.doubt[name], eps**0.4 * size, eps**0.75 * total):
            worst = max(worst or 0.0, off / size)
    return worst


def _is_gradient_of_loss(fn: ScalarFunction, params: Params, args: tuple[object, ...]) -> bool:
    """Whether the gradient is the derivative of the loss, along a generic direction."""
    doubled = in_double((params, args))
    for point, data in (doubled, (params, args)):
        try:
            return _slope_fits(fn, point, data)
        except Exception:  # see above
            continue
    return False


def _slope_fits(fn: ScalarFunction, point: Params, args: Any) -> bool:
    eps = rounding(point.values())
    w = generic(point, seed=1)
    h = eps**0.2 / 4 * max(norm(point), 1.0) / norm(w)

    def value(t: float) -> float:
        moved = {name: p.detach() + t * w[name] for name, p in point.items()}
        with at(fn, moved, *args):
            return float(fn(moved, *args).detach().double())

    slopes = [
        (8 * (value(s) - value(-s)) - (value(2 * s) - value(-2 * s))) / (12 * s) for s in (h, h / 2)
    ]
    gradient = first_gradient(fn, point, args)
    expected = sum(float((g.double() * w[n].double()).sum()) for n, g in gradient.items())
    scale = norm(gradient) * norm(w) / sum(p.numel() for p in point.values()) ** 0.5
    tolerance = 10 * abs(slopes[0] - slopes[1]) + eps**0.4 * max(abs(expected), scale)
    return bool(abs(slopes[1] - expected) <= tolerance)


def in_double(tensors: Any) -> Any:
    """The same with all that is real in double precision."""
    return pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tensors
    )
