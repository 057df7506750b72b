"""How the cost of a product grows with the batches and with the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import ours
import peers
from contests import Plan
from entrants import Entrant
from timing import interleaved
from workloads import Workload, mlp, tiny


@dataclass(frozen=True)
class Curve:
    """The seconds of one product at growing sizes."""

    title: str
    axis: str
    entrant: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]


ENTRANTS = (ours.LIVE, ours.KEPT[0], *(e for e in peers.PEERS if e.name == "by hand"))


def measured(plan: Plan) -> list[Curve]:
    """Batches and parameters from 1x to the last of ``plan.sizes``."""
    curves = _curves("batches", lambda k: tiny(batches=2 * k), plan)
    return curves + _curves("parameters", lambda k: mlp(1, width=_width(k)), plan)


def _width(k: int) -> int:
    """Of the `mlp` that has k times the parameters of that of width 192: ``w^2 + 796 w + 10``."""
    parameters = k * (192**2 + 796 * 192 + 10)
    return round(math.sqrt(398**2 + parameters - 10) - 398)


def _curves(axis: str, make: Callable[[int], Workload], plan: Plan) -> list[Curve]:
    calls, numbers = {}, []
    # From large to small: a large one leaves the caches cold, which a small one would pay for.
    for k in reversed(plan.sizes):
        workload = make(k)
        batches = len(list(workload.data))
        numbers.insert(0, batches if axis == "batches" else workload.parameters)
        for entrant in ENTRANTS:
            calls[entrant.name, k] = _product(entrant, workload)
    samples = interleaved(calls, repeats=plan.repeats, clock=plan.clock)
    return [
        Curve(
            f"cost of a product and {axis}",
            axis,
            entrant.name,
            tuple(numbers),
            tuple(samples[entrant.name, k].median for k in plan.sizes),
        )
        for entrant in ENTRANTS
    ]


def _product(entrant: Entrant, workload: Workload) -> Callable[[], object]:
    product, v = entrant.build(workload), workload.vectors()
    return lambda: product.vector(v)
