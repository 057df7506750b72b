"""Why a product is not finite, or zero: which batch, and whether the vector, the loss or a derivative."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from ..graph import backward
from ..risk import EmpiricalRisk, Term
from ..risk.weighing import UNREACHED
from ..strategies import HVPStrategy, Params
from ..strategies.authored import in_double
from ..strategies.base import ScalarFunction, at
from ..strategies.finite_difference import first_gradient
from ..strategies.referee import is_smooth
from .space import multiplier


def culprit(
    terms: Iterable[Term], point: Params, state: Params, strategy: HVPStrategy, columns: Params
) -> str:
    """The first thing that is not finite on the way to the product of some columns, in words."""
    if not all(column.isfinite().all() for column in columns.values()):
        return "the vector it multiplies is not"
    for name, parameter in point.items():
        if not parameter.isfinite().all():
            return f"parameter {name} is not"
    for term in terms:
        found = _in_term(term, point, state, strategy, columns)
        if found:
            return f"in {term.label} {found}"
    return "the sum over the batches overflows"


def _in_term(
    term: Term, point: Params, state: Params, strategy: HVPStrategy, columns: Params
) -> str | None:
    leaves = {name: p.detach().requires_grad_() for name, p in point.items()}
    fn, args = term.function, (state, *term.data)
    with torch.inference_mode(False), torch.enable_grad(), at(fn, leaves, *args):
        loss = fn(leaves, *args)
        if not loss.isfinite():
            return f"the loss is {loss.item()}"
        gradient = first_gradient(fn, leaves, args)
    for name, g in gradient.items():
        if not g.isfinite().all():
            return f"the gradient of {name} is not finite"
    linear = strategy.linearize(term.function, point, state, *term.data)
    computed = multiplier(columns)(linear)
    for name, product in zip(point, computed, strict=True):
        if not product.isfinite().all():
            return (
                f"the second derivative is not finite at {name}, although loss and gradient are: "
                "it may not exist at this point (a norm or a square root at zero)"
            )
    return None


def differences_serve(
    terms: Iterable[Term], point: Params, state: Params, strategy: HVPStrategy, columns: Params
) -> bool:
    """Whether a second derivative exists wherever it comes out as not finite, though gradients are."""
    found = False
    for term in terms:
        fn, args = term.function, (state, *term.data)
        if not all(g.isfinite().all() for g in first_gradient(fn, point, args).values()):
            return False
        product = multiplier(columns)(strategy.linearize(fn, point, *args))
        if all(t.isfinite().all() for t in product):
            continue
        found = True
        if not _has_second_derivative(fn, point, args):
            return False
    return found


def _has_second_derivative(fn: ScalarFunction, point: Params, args: tuple[Any, ...]) -> bool:
    for place, data in (in_double((point, args)), (point, args)):
        with suppress(Exception):  # a constant or a cast of the user's own holds on to its dtype
            return is_smooth(partial(first_gradient, fn, args=data), place)
    return False


def refuse_unreached(risk: EmpiricalRisk, point: Params, state: Params) -> None:
    """Raise if ``backward()`` of no batch's loss gives a gradient to any parameter."""
    leaves = {name: p.detach().requires_grad_() for name, p in point.items()}
    for term in risk.terms():
        fn, args = term.function, (state, *term.data)
        with torch.inference_mode(False), torch.enable_grad(), at(fn, leaves, *args):
            if backward(fn(leaves, *args), leaves):
                return
    raise ValueError(UNREACHED)
