"""Products from differences of plain ``backward()`` gradients, which trust no second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..risk import EmpiricalRisk, Term
from ..risk.batches import map_tensors
from ..strategies import Params
from ..strategies.base import grad_enabled
from ..strategies.rounding import rounding
from .space import WeightedSum

STEPS = 4
"""How many steps are tried, each a fraction of the one before, until two agree."""


@dataclass(frozen=True)
class Difference:
    """A product, and how far those found with two steps are apart."""

    product: Tensor  # (n, 1), float64
    error: float  # relative; large if there are kinks near the point, or too few digits


def difference(
    risk: EmpiricalRisk, terms: list[Term], point: Params, state: Params, v: Params
) -> Difference:
    """``H v`` by fourth-order central differences of the gradient along ``v``.

    In double precision, if the model can be evaluated in it: only there are steps possible that are
    long enough to see a curvature and too short to meet the next kink of a large ReLU network.
    """
    terms = [term._replace(data=map_tensors(_own, term.data)) for term in terms]
    if not any(map(risk.is_random, terms)):  # what is drawn may depend on the dtype
        with suppress(Exception):  # a constant or a cast of the user's own holds on to its dtype
            exact = [term._replace(data=_in_double(term.data)) for term in terms]
            doubled = [_in_double(tensors) for tensors in (point, state, v)]
            return _agreed(risk, exact, *doubled)
    return _agreed(risk, terms, point, state, v)


def _agreed(
    risk: EmpiricalRisk, terms: list[Term], point: Params, state: Params, v: Params
) -> Difference:
    """The difference for the first step that agrees with the next one, or else nearly does."""
    eps = rounding(point.values())
    found: list[Difference] = []
    coarse: Tensor | None = None
    for h in _steps(eps, max(_norm(point), 1.0) / _norm(v)):
        fine = _quotient(lambda t: _gradient(risk, terms, point, state, v, t), h)
        if coarse is not None:
            error = float((fine - coarse).norm() / coarse.norm().clamp_min(1e-30))
            found.append(Difference(coarse, error))
            if error < eps**0.5:
                break
        coarse = fine
    return min(found, key=lambda d: d.error if d.error == d.error else float("inf"))


def _steps(eps: float, length: float) -> Iterator[float]:
    ratio = 1 / 16 if eps < 1e-12 else 1 / 4
    return (length * eps**0.2 / 4 * ratio**i for i in range(STEPS))


def _quotient(gradient: Callable[[float], Tensor], h: float) -> Tensor:
    near, far = gradient(h) - gradient(-h), gradient(2 * h) - gradient(-2 * h)
    return (8 * near - far) / (12 * h)


def _gradient(
    risk: EmpiricalRisk, terms: list[Term], point: Params, state: Params, v: Params, t: float
) -> Tensor:
    """The gradient at ``point + t v``, over all terms, shape (n, 1)."""
    moved = {name: p + t * v[name] for name, p in point.items()}
    total = WeightedSum(risk.average.normalized)
    with grad_enabled():
        for term in terms:
            gradient = risk.gradient(moved, state, *term.data)
            dense = [g.to_dense() if g.is_sparse else g for g in gradient.values()]
            total.add([g.double() for g in dense], term.weight)
    device = next(iter(point.values())).device
    return torch.cat([g.reshape(-1, 1).to(device) for g in total.result()])


def _own(tensor: Tensor) -> Tensor:
    """An alias if it requires a gradient, so that none is left in the user's tensor."""
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor


def _in_double(tensors: Any) -> Any:
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, tensors)


def _norm(tensors: Params) -> float:
    return math.hypot(*(float(t.double().norm()) for t in tensors.values()))
