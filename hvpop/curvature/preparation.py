"""What a linearized Hessian does once, before its first product, within a memory budget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

from ..risk import EmpiricalRisk, Term
from ..risk.batches import tensors_in
from ..risk.merging import concatenated, stacked
from ..strategies import Compiled, HVPStrategy, LinearMap, Params
from ..strategies.base import out_of_memory
from .formed import formed
from .joining import LIVE_BYTES
from .lending import Lent, owned, shared_bytes
from .memory import bytes_of, graph_bytes, map_bytes

Join = Callable[[Sequence[Term]], Term | None]

JOINED_BYTES = 32 * 2**20
"""Batches run as one until their graph is this large. Below it Python and autograd bookkeeping
dominate (8 batches of a 64-32-10 network: three quarters of the time); above, nothing is gained."""

TRACED_BYTES = 96 * 2**20
"""The same for traces, which have less arithmetic beside the bookkeeping. Two batches of a small transformer
as one, whose graph has 67 MiB: 0.96 of the time; of a convolutional network, with 148 MiB: 1.07."""


@dataclass(frozen=True)
class Part:
    """Some batches as one function, and its linear map if that is kept."""

    group: list[Term]
    held: Term | None  # None: put together anew for each product, as there is no room for more data
    join: Join | None
    map: LinearMap | None

    @property
    def batches(self) -> int:
        return len(self.group)

    @property
    def term(self) -> Term:
        """The batches as one."""
        if self.held is not None:
            return self.held
        joined = self.join(self.group) if self.join is not None else None
        if joined is None:
            raise RuntimeError("batches that fitted together do so no longer; build a new operator")
        return joined


class Preparation:
    """Batches held, joined and linearized, as far as the budget allows.

    In order of what they save per byte: batches are held in memory (what the user holds anyway is
    free), small ones are joined, and maps are kept. The rest is read or linearized again at each
    product. The point and the state count, too; they are kept whatever the budget is.
    """

    def __init__(
        self, risk: EmpiricalRisk, strategy: HVPStrategy, point: Params, state: Params, budget: int
    ) -> None:
        self._risk, self._strategy = risk, strategy
        self._point, self._state = point, state
        self._budget = budget
        self._graph_bytes: dict[tuple[object, ...], int] = {}
        self._made: tuple[Term, LinearMap] | None = None  # a map that was made to be measured
        self._held_bytes = bytes_of([*point.values(), *state.values()])
        self._joined_bytes = self._kept_bytes = 0
        self._keeping = True
        self._narrowed = sys.maxsize  # columns at once, since memory has run out
        self.terms, self.complete = self._hold()
        # those not held follow in a product
        self._lent = [Lent(term, risk.in_memory) for term in self.terms]
        self._alone: list[tuple[Term, Lent]] = []
        self.parts: list[Part] = []
        self.tried_forming = self.formed = False
        self.tried_tracing = self.traced = False
        self.batches = len(self.terms)  # of the data, as far as a pass has shown

    @property
    def bytes(self) -> int:
        """What the point, batches and maps hold."""
        return self._held_bytes + self._joined_bytes + self._kept_bytes

    @property
    def joined(self) -> bool:
        """Whether any batches run as one, which has to be proven right."""
        return len(self.parts) < len(self.terms)

    def joins(self) -> list[Join]:
        """The ways of running batches as one that are worth trying, in order."""
        if not self.complete or self._risk.mode == "full" or len(self.terms) < 2:
            return []
        own_weights = self._risk.average.weight is None
        known: list[Join] = [concatenated, stacked] if own_weights else [stacked]
        ways = [join for join in known if len(self._groups(join)) < len(self.terms)]
        if ways and self._risk.is_random(self.terms[0], self._point, self._state):
            return []  # each batch has random numbers of its own
        return ways

    def pair(self, join: Join) -> list[Term]:
        """The smallest two of some batches that would be put together by ``join``."""
        group = next(group for group in self._groups(join) if len(group) > 1)
        return sorted(group, key=lambda term: bytes_of(tensors_in(term.data)))[:2]

    def build(self, join: Join | None) -> None:
        """Linearize all batches, in groups put together by ``join``."""
        self.parts.clear()
        self._joined_bytes = self._kept_bytes = 0
        for group in self._groups(join):
            joined = join(group) if join and len(group) > 1 else None
            if joined is None:
                self.parts += [Part([term], term, None, self._kept_map(term)) for term in group]
                continue
            if join is concatenated:  # no larger than the graphs of its batches; spares a look
                self._graph_bytes[_shape(joined)] = sum(map(self._size, group))
            size = bytes_of(tensors_in(joined.data))
            if self.bytes + size > self._budget:
                self.parts.append(Part(group, None, join, None))
            else:
                self._joined_bytes += size
                self.parts.append(Part(group, joined, join, self._kept_map(joined)))
        self._made = None
        alone = {id(part.held) for part in self.parts}
        pairs = zip(self.terms, self._lent, strict=False)
        self._alone = [(term, lent) for term, lent in pairs if id(term) in alone and lent.watched]

    def rest(self) -> Iterator[Term]:
        """The batches that do not fit in memory, read again."""
        if not self.complete:
            count = len(self.terms)
            with closing(self._risk.terms()) as terms:
                for term in islice(terms, count, None):
                    if count == len(self._lent):
                        self._lent.append(Lent(term, self._risk.in_memory))
                    elif self._risk.in_memory:
                        self._lent[count].refuse_written(term)
                    count += 1
                    yield term
            self.batches = count

    def is_self_contained(self) -> bool:
        """Whether products are made of what is kept, and look at nothing else."""
        maps = (part.map for part in self.parts)
        return self.complete and all(linear is not None and not linear.looks for linear in maps)

    def refuse_written(self) -> None:
        """Raise if a batch that is held was written to in place since it was read."""
        for term, lent in zip(self.terms, self._lent, strict=False):
            lent.refuse_written(term)

    def refuse_shared(self) -> None:
        """The same of what torch does not see, of batches that are not put together, which copies."""
        for term, lent in self._alone:
            lent.refuse_shared(term)

    def release(self) -> bool:
        """Give up the last map that is kept, to make room; False if none is."""
        self._keeping = False
        for i, part in reversed(list(enumerate(self.parts))):
            if part.map is not None:
                self._kept_bytes -= _bytes_held(part.map, self._size(part.term))
                self.parts[i] = replace(part, map=None)
                return True
        return False

    def trace(self, tracer: Compiled) -> None:
        """Exchange kept maps for traced ones, one after the other, as far as that can be and fits."""
        self.tried_tracing = True
        for i, part in enumerate(self.parts):
            if part.map is None or part.map.bare:
                continue
            self.parts[i] = replace(part, map=None)  # room for the new one
            size = self._size(part.term)
            self._kept_bytes -= size
            linear = self._kept(tracer, part.term, size)
            self.parts[i] = replace(part, map=linear or self._kept_map(part.term))
            if linear is None or tracer.fallback_reason is not None:
                return
            self.traced = True

    def form(self) -> None:
        """Exchange maps for their rows, once, where that takes no more memory, and where there is room."""
        self.tried_forming = True
        for i, part in enumerate(self.parts):
            graph = self._size(part.term)
            held = 0 if part.map is None else _bytes_held(part.map, graph)
            rows = formed(
                part.map or self.linearized(part.term),
                most=min(graph, self._budget - self.bytes + held),
            )
            if rows is not None:
                self.parts[i] = replace(part, map=rows)
                self._kept_bytes += rows.residual_bytes - held
                self.formed = True

    def columns_at_once(self) -> int:
        """How many columns fit beside what is kept: each passes through tensors of a graph's size.

        A power of two, which the blocks of the strategies are, too.
        """
        largest = max((self._size(part.term) for part in self.parts), default=1)
        fit = max(self._budget - self.bytes, LIVE_BYTES) // max(1, largest)
        return min(self._narrowed, 1 << max(0, fit.bit_length() - 1))

    def narrow(self, columns: int) -> bool:
        """Take half as many columns at once, since memory ran out; False if it was one."""
        width = min(self.columns_at_once(), columns)
        self._narrowed = max(1, width // 2)
        return width > 1

    def linearized(self, term: Term) -> LinearMap:
        """The map of a term, made now."""
        return self._strategy.linearize(term.function, self._point, self._state, *term.data)

    def _hold(self) -> tuple[list[Term], bool]:
        held: list[Term] = []
        with closing(self._risk.terms()) as terms:
            for term in terms:
                if not self._risk.in_memory:
                    size = bytes_of(tensors_in(term.data))
                elif (size := shared_bytes(term)) and self._held_bytes + size <= self._budget:
                    term = owned(term)
                else:
                    size = 0  # the user's, and watched: see `Lent`
                if self._held_bytes + size > self._budget:
                    return held, False
                self._held_bytes += size
                held.append(term)
        return held, True

    def _groups(self, join: Join | None) -> list[list[Term]]:
        if join is None:
            return [[term] for term in self.terms]
        # With little memory what runs as one is not kept, and no larger than of a live product.
        least = LIVE_BYTES if join is concatenated else 0
        most = TRACED_BYTES if isinstance(self._strategy, Compiled) else JOINED_BYTES
        limit = min(most, max((self._budget - self._held_bytes) // 4, least))
        groups: list[list[Term]] = []
        filled, shape = 0, None
        for term in self.terms:
            size = self._size(term)
            fits = join is concatenated or shape == _shape(term)
            if groups and fits and filled + size <= limit:
                groups[-1].append(term)
                filled += size
            else:
                groups.append([term])
                filled, shape = size, _shape(term)
        return groups

    def _kept_map(self, term: Term) -> LinearMap | None:
        """The map of a term if the budget has room for what it holds."""
        size = self._size(term)
        if not self._keeping or self.bytes + size > self._budget:
            return None
        return self._kept(self._strategy, term, size)

    def _kept(self, strategy: HVPStrategy, term: Term, size: int) -> LinearMap | None:
        """The map of a term, counted; None if it is larger than ``size``, and too large."""
        made, self._made = self._made, None
        try:
            if made is not None and made[0] is term and strategy is self._strategy:
                linear = made[1]
            else:
                del made
                linear = strategy.linearize(term.function, self._point, self._state, *term.data)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.release()  # the estimate was wrong, or others took the memory
            return None
        if not self._kept_bytes:  # the first: is a trace still of the function?
            linear.verify()
        size = _bytes_held(linear, size)
        if self.bytes + size > self._budget:
            return None
        self._kept_bytes += size
        return linear

    def _size(self, term: Term) -> int:
        """The bytes that a term's map holds: measured once for each shape, on the plain strategy."""
        shape = _shape(term)
        if shape not in self._graph_bytes:
            self._graph_bytes[shape] = self._measured(term)
        return self._graph_bytes[shape]

    def _measured(self, term: Term) -> int:
        """The size of a map, which is not made again if it is the one that is kept."""
        plain = self._strategy.plain

        def make() -> LinearMap:
            return plain.linearize(term.function, self._point, self._state, *term.data)

        known = [*self._point.values(), *self._state.values(), *tensors_in(term.data)]
        linear = make()
        size = map_bytes(linear, known)
        if size is None:
            del linear
            try:
                return graph_bytes(make, known)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                return self._budget + 1  # cannot be measured: never kept
        if self._made is None and plain is self._strategy:
            self._made = term, linear
        return size


def _bytes_held(linear: LinearMap, graph: int) -> int:
    """What a map says that it holds, or else what its graph does."""
    return int(getattr(linear, "residual_bytes", graph))


def _shape(term: Term) -> tuple[object, ...]:
    tensors = tensors_in(term.data)  # nested ones are each of a shape of its own
    return tuple((id(t) if t.is_nested else tuple(t.shape), t.dtype) for t in tensors)
