"""Products from differences of gradients, which trust no second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .base import Params
from .rounding import rounding

STEPS = 4
"""How many steps are tried, each a fraction of the one before, until two agree."""


@dataclass(frozen=True)
class Difference:
    """A product, and how far those found with two steps are apart."""

    product: Params  # float64
    doubt: dict[str, float]  # by parameter: the norm of the difference of the two
    error: float  # of all, relative; large if there are kinks near the point, or too few digits


def difference(gradient: Callable[[Params], Params], point: Params, v: Params) -> Difference:
    """``H v`` by fourth-order central differences of the gradient along ``v``.

    Of the first step that agrees with the next one, or else of the one that nearly does.
    """
    eps = rounding(point.values())
    found: list[Difference] = []
    coarse: Params | None = None
    for h in _steps(eps, max(norm(point), 1.0) / norm(v)):
        fine = _quotient(gradient, point, v, h)
        if coarse is not None:
            apart = {n: float((fine[n] - c).norm()) for n, c in coarse.items()}
            error = math.hypot(*apart.values()) / max(norm(coarse), 1e-300)
            found.append(Difference(coarse, apart, error))
            if error < eps**0.5:
                break
        coarse = fine
    return min(found, key=lambda d: d.error if d.error == d.error else math.inf)


def is_smooth(gradient: Callable[[Params], Params], point: Params) -> bool:
    """Whether a gradient has a derivative, not all zero, as far as its differences can tell.

    Those of two steps agree, those ahead and behind do, and those along a sum are the sum.
    """
    eps = rounding(point.values())
    a, b = generic(point), generic(point, seed=1)
    both = {name: a[name] + b[name] for name in a}
    found = [difference(gradient, point, v) for v in (a, b, both)]
    total = max(norm(d.product) for d in found)
    if not 0 < total < math.inf:
        return False
    for name in point:
        x, y, z = (d.product[name] for d in found)
        size = max(float(t.norm()) for t in (x, y, z))
        allowed = max(eps**0.4 * size, eps**0.75 * total)
        if not max(*(d.doubt[name] for d in found), float((x + y - z).norm())) <= allowed:
            return False
    step = eps ** (1 / 3) * max(norm(point), 1.0) / norm(a)
    bends = [_bend(gradient, point, a, h) for h in (step, step / 4)]
    return bool(bends[1] <= max(bends[0] / 2, eps**0.4 * total))


def _bend(gradient: Callable[[Params], Params], point: Params, v: Params, h: float) -> float:
    """How far quotients ahead and behind are apart: of the order of the step, unless there is a kink."""
    ahead, here, behind = (
        gradient({name: p.detach() + t * v[name] for name, p in point.items()}) for t in (h, 0, -h)
    )
    return norm({n: (ahead[n].double() - 2 * here[n].double() + behind[n].double()) / h for n in v})


def _steps(eps: float, length: float) -> Iterator[float]:
    ratio = 1 / 16 if eps < 1e-12 else 1 / 4
    return (length * eps**0.2 / 4 * ratio**i for i in range(STEPS))


def _quotient(gradient: Callable[[Params], Params], point: Params, v: Params, h: float) -> Params:
    def at(t: float) -> Params:
        found = gradient({name: p.detach() + t * v[name] for name, p in point.items()})
        return {n: (g.to_dense() if g.is_sparse else g).double() for n, g in found.items()}

    ahead, behind, far, back = at(h), at(-h), at(2 * h), at(-2 * h)
    return {n: (8 * (ahead[n] - behind[n]) - (far[n] - back[n])) / (12 * h) for n in ahead}


def norm(tensors: Params) -> float:
    """Of all entries, in float64."""
    return math.hypot(*(float(t.detach().double().norm()) for t in tensors.values()))


def generic(params: Params, *k: int, seed: int = 0) -> Params:
    """A direction like any other, or k of them, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn((*k, *p.shape), dtype=p.dtype, generator=generator).to(p.device)
        for name, p in params.items()
    }
