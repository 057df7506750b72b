"""How the cost of a product grows with the batches and with the parameters."""

from __future__ import annotations

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
    # Squares of hidden layers dominate: the width grows as the root of the size.
    return curves + _curves("parameters", lambda k: mlp(1, width=round(192 * k**0.5)), plan)


def _curves(axis: str, make: Callable[[int], Workload], plan: Plan) -> list[Curve]:
    calls, numbers = {}, []
    for k in plan.sizes:
        workload = make(k)
        batches = len(list(workload.data))
        numbers.append(batches if axis == "batches" else workload.parameters)
        for entrant in ENTRANTS:
            calls[entrant.name, k] = _product(entrant, workload)
    samples = interleaved(calls, repeats=min(plan.repeats, 7), clock=plan.clock)
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
