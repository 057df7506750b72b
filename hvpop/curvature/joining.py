"""Small batches of a live operator run as one, once that has been proven right."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor

from ..risk import EmpiricalRisk, Term
from ..risk.batches import tensors_in
from ..risk.merging import concatenated, form_of
from ..strategies import HVPStrategy, Params
from ..strategies.rounding import agree, nudged, reordered, rounding
from .memory import graph_bytes
from .space import WeightedSum, multiplier

LIVE_BYTES = 4 * 2**20
"""Batches of a live product are run as one until their graph is this large. Bookkeeping is most of
the cost below it (8 batches of a 64-32-10 network as one: 0.4 of the time), and a live product
promises the memory of one batch."""


ATTEMPTS = 4
"""Products at which a join that could not be proven is tried again: the point may have moved."""


class LiveJoin:
    """Concatenates small batches of models made of ordinary layers.

    Of those only, since they cannot change their ways between products; that samples run along the
    first dimension is proven at the first product, by comparison with batches run one by one.
    """

    def __init__(self, risk: EmpiricalRisk, strategy: HVPStrategy) -> None:
        self._seed, self._strategy = risk.seed, strategy
        self._attempts = 0
        self._bytes_per_entry: float | None = None  # of data, in a batch's graph; None: not proven
        self._possible = (
            risk.mode == "batch"
            and risk.average.weight is None
            and getattr(strategy, "current", strategy).exact
        )

    def terms(
        self, risk: EmpiricalRisk, point: Params, state: Params
    ) -> Generator[Term, None, None]:
        """One pass over the data of the risk as it is now, small batches put together."""
        with closing(risk.terms()) as terms:
            if not self._possible or not risk.plain:
                yield from terms
                return
            first = list(islice(terms, 2))
            if len(first) == 2 and self._bytes_per_entry is None:
                self._bytes_per_entry = self._proven(first, point, state)
            group: list[Term] = []
            filled, form = 0.0, None
            while term := first.pop(0) if first else next(terms, None):
                size = (self._bytes_per_entry or 0.0) * _entries(term)
                apart = self._bytes_per_entry is None or filled + size > LIVE_BYTES
                own = form_of(term)
                if group and (apart or own != form):
                    yield _as_one(group)
                    group, filled = [], 0.0
                form = own
                group.append(term)
                filled += size
            if group:
                yield _as_one(group)

    def _proven(self, pair: list[Term], point: Params, state: Params) -> float | None:
        """The size of a graph per entry of data, if two batches can be run as one; None if not."""
        term, multiply = pair[0], multiplier(random_direction(point, self._seed))
        # with a product, which is where forward mode has its graph
        size = graph_bytes(
            lambda: multiply(
                self._strategy.plain.linearize(term.function, point, state, *term.data)
            ),
            [],
        )
        seen = 2 * size <= LIVE_BYTES and run_as_one(self._strategy, pair, point, state, self._seed)
        self._attempts += 1
        self._possible = seen or (seen is None and self._attempts < ATTEMPTS)
        return size / max(_entries(pair[0]), 1) if seen else None


def run_as_one(
    strategy: HVPStrategy, pair: list[Term], point: Params, state: Params, seed: int
) -> bool | None:
    """Whether two batches, concatenated, have the product that they have one by one.

    None if that could not be seen: zero against zero proves nothing.
    """
    joined = concatenated(pair)
    if joined is None:
        return False
    multiply = multiplier(random_direction(point, seed))

    def product(terms: list[Term], place: Params = point) -> list[Tensor]:
        total = WeightedSum(normalized=True)
        for term in terms:
            linear = strategy.plain.linearize(term.function, place, state, *term.data)
            total.add(multiply(linear), term.weight)
        return total.result()

    truth = product(pair)
    try:
        if not same(product([joined]), truth, point, lambda: product(pair, nudged(point))):
            return False
        return True if all(bool(t.any()) for t in truth) else None
    except Exception:  # batches that do not fit together
        return False


def random_direction(point: Params, seed: int) -> Params:
    """One column ``(1, *shape)`` for each parameter, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(1, *p.shape, generator=generator, device="cpu").to(p)
        for name, p in point.items()
    }


COARSEST = 2e-2
"""What batches run as one may differ by at most, relative, however coarse the numbers are."""


def same(
    products: list[Tensor],
    truth: list[Tensor],
    point: Params,
    again: Callable[[], list[Tensor]],
) -> bool:
    """Equal up to rounding, which sums over samples and layers may amplify by some hundreds.

    ``again()`` is the truth at the next point.
    """
    eps = rounding([*truth, *point.values()])
    return agree(products, truth, min(1000 * eps, reordered(eps), COARSEST), again)


def _as_one(group: list[Term]) -> Term:
    if len(group) == 1:
        return group.pop()  # held no longer than it is in use
    joined = concatenated(group)
    if joined is None:
        raise RuntimeError("batches that fitted together do so no longer; build a new operator")
    return joined


def _entries(term: Term) -> int:
    return sum(t.numel() for t in tensors_in(term.data[0]))
