"""The doctor's reference: differences of plain ``backward()`` gradients over some batches."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from ..risk import EmpiricalRisk, Term
from ..risk.batches import map_tensors
from ..strategies import Params
from ..strategies.base import grad_enabled
from ..strategies.referee import Difference, difference
from .space import WeightedSum


def over_terms(
    risk: EmpiricalRisk, terms: list[Term], point: Params, state: Params, v: Params
) -> Difference:
    """``H v`` by differences of the gradient along ``v``.

    In double precision, if the model can be evaluated in it: only there are steps possible that are
    long enough to see a curvature and too short to meet the next kink of a large ReLU network.
    """
    terms = [term._replace(data=map_tensors(_own, term.data)) for term in terms]
    random = [risk.is_random(term, point, state) for term in terms]
    if not any(random):  # what is drawn may depend on the dtype
        with suppress(Exception):  # a constant or a cast of the user's own holds on to its dtype
            exact = [term._replace(data=_in_double(term.data)) for term in terms]
            place, held, direction = (_in_double(tensors) for tensors in (point, state, v))
            return difference(lambda p: gradient(risk, exact, p, held), place, direction)
    return difference(lambda p: gradient(risk, terms, p, state), point, v)


def gradient(risk: EmpiricalRisk, terms: list[Term], point: Params, state: Params) -> Params:
    """The gradient over all terms, in float64."""
    total = WeightedSum(risk.average.normalized)
    with grad_enabled():
        for term in terms:
            found = risk.gradient(point, state, *term.data)
            dense = [g.to_dense() if g.is_sparse else g for g in found.values()]
            total.add([g.double() for g in dense], term.weight)
    return dict(zip(point, total.result(), strict=True))


def _own(tensor: Tensor) -> Tensor:
    """An alias if it requires a gradient, so that none is left in the user's tensor."""
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor


def _in_double(tensors: Any) -> Any:
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, tensors)
