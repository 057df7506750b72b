"""What a linearized Hessian does once, before its first product, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from ..risk import EmpiricalRisk, Term
from ..risk.batches import tensors_in
from ..risk.merging import concatenated, stacked
from ..strategies import HVPStrategy, LinearMap, Params
from .memory import bytes_of, graph_bytes, out_of_memory

Join = Callable[[Sequence[Term]], Term | None]

MERGED_BYTES = 32 * 2**20
"""Batches run as one until their graph is this large. Below it Python and autograd bookkeeping
dominate (8 batches of a 64-32-10 network: a quarter of the time); above, nothing is gained."""


@dataclass(frozen=True)
class Part:
    """Some batches as one function, and its linear map if that is kept."""

    term: Term
    batches: int
    map: LinearMap | None


class Preparation:
    """Batches held, joined and linearized, as far as the budget allows.

    In order of what they save per byte: batches are held in memory (what the user holds anyway is
    free), small ones are joined, and maps are kept. The rest is read or linearized again at each
    product.
    """

    def __init__(
        self, risk: EmpiricalRisk, strategy: HVPStrategy, point: Params, state: Params, budget: int
    ) -> None:
        self._risk, self._strategy = risk, strategy
        self._point, self._state = point, state
        self._budget = budget
        self.bytes = 0
        self.terms, self.complete = self._hold()
        self._graph_bytes: dict[tuple[object, ...], int] = {}
        self._joins: list[Join] = self._possible_joins()
        self.parts: list[Part] = []
        self._build()

    @property
    def joined(self) -> bool:
        """Whether any batches run as one, which has to be proven right."""
        return len(self.parts) < len(self.terms)

    def rest(self) -> Iterator[Term]:
        """The batches that do not fit in memory, read again."""
        if not self.complete:
            with closing(self._risk.terms()) as terms:
                yield from islice(terms, len(self.terms), None)

    def separate(self) -> None:
        """Give up the present way of joining batches for the next one, in the end for none."""
        self._joins.pop(0)
        self._build()

    def _hold(self) -> tuple[list[Term], bool]:
        held: list[Term] = []
        with closing(self._risk.terms()) as terms:
            for term in terms:
                size = 0 if self._risk.in_memory else bytes_of(tensors_in(term.data))
                if self.bytes + size > self._budget:
                    return held, False
                self.bytes += size
                held.append(term)
        return held, True

    def _possible_joins(self) -> list[Join]:
        if not self.complete or self._risk.mode == "full" or self._risk.couples_samples():
            return []
        own_weights = self._risk.average.weight is None
        return [concatenated, stacked] if own_weights else [stacked]

    def _build(self) -> None:
        self.parts.clear()
        self._kept = 0
        self._keeping = True
        for group in self._groups():
            joined = self._joins[0](group) if len(group) > 1 else None
            if joined is not None:
                self.parts.append(Part(joined, len(group), self._kept_map(joined)))
            else:
                self.parts += [Part(term, 1, self._kept_map(term)) for term in group]

    def _groups(self) -> list[list[Term]]:
        if not self._joins or len(self.terms) < 2:
            return [[term] for term in self.terms]
        limit = min(MERGED_BYTES, self._budget // 4)
        groups: list[list[Term]] = []
        filled, shape = 0, None
        for term in self.terms:
            size = self._size(term)
            same = self._joins[0] is concatenated or shape == _shape(term)
            if groups and same and filled + size <= limit:
                groups[-1].append(term)
                filled += size
            else:
                groups.append([term])
                filled, shape = size, _shape(term)
        return groups

    def _kept_map(self, term: Term) -> LinearMap | None:
        """The map of a term if the budget has room for what it holds."""
        size = self._size(term)
        if not self._keeping or self.bytes + self._kept + size > self._budget:
            return None
        try:
            linear = self.linearized(term)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._keeping = False  # the estimate was wrong, or others took the memory
            return None
        self._kept += size
        return linear

    @property
    def kept_bytes(self) -> int:
        """What batches and maps hold together."""
        return self.bytes + self._kept

    def linearized(self, term: Term) -> LinearMap:
        """The map of a term, made now."""
        return self._strategy.linearize(term.function, self._point, self._state, *term.data)

    def _size(self, term: Term) -> int:
        """The bytes that a term's map holds: measured once for each shape."""
        shape = _shape(term)
        if shape not in self._graph_bytes:
            known = [*self._point.values(), *self._state.values(), *tensors_in(term.data)]
            linear, size = graph_bytes(lambda: self.linearized(term), known)
            self._graph_bytes[shape] = getattr(linear, "residual_bytes", size)
        return self._graph_bytes[shape]


def _shape(term: Term) -> tuple[object, ...]:
    return tuple((tuple(t.shape), t.dtype) for t in tensors_in(term.data) if isinstance(t, Tensor))
