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
