"""Rectangular matrices of data: the rows of each batch under those of the one before, never formed."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor

from ..exchange import guarded
from ..marker import Cutting
from ..operators import Layout, LinearOperator
from ..operators.base import Memory
from ..operators.crossing import working_dtype
from ..risk import EmpiricalRisk, Term
from ..risk.batches import tensors_in
from ..risk.modules import Selection
from ..strategies import FirstThatWorks, HVPStrategy, Params
from ..strategies.base import grad_enabled
from ..strategies.by_rows import ROWS, ByRows, Ends, RowsMap
from ..strategies.fallback import settled
from ..strategies.parted import Parted
from .average import Place
from .memory import budget_in_bytes
from .preparation import Preparation
from .space import from_point, layout_of, multiplier, space_of, to_point

ROWS_AT_ONCE = 64
"""Rows that are made together where the matrix itself is asked for."""


class Rows(Protocol):
    """Makes the rows of a batch."""

    cutting: Cutting

    def __call__(self, parted: Parted) -> Ends: ...

    def count(self, parted: Parted) -> int: ...


class Stacked(LinearOperator):
    """A matrix of which each batch has some rows and each entry of a parameter is a column.

    Follows the live model; `linearize` takes it as it is now. A product with columns is one pass
    over the data, and so is one with the transpose, in the memory of one batch. How many rows there
    are is counted when the operator is made: batches are read once, and one of each shape is
    evaluated.
    """

    _fresh = True

    def _build(self, risk: EmpiricalRisk, rows: Rows, strategy: HVPStrategy | None) -> None:
        if strategy is not None and not isinstance(strategy, HVPStrategy):
            raise TypeError(f"strategy must be an HVPStrategy object, got {strategy!r}")
        self._kept: Kept | None = None
        chosen = FirstThatWorks() if strategy is None else strategy.plain
        self.risk, self._rows, self._chosen = risk.whole(), rows, chosen
        self.strategy = chosen.within(lambda one: self._map_of(one, keeps=False))
        point = self.risk.parameters()
        self._layout = layout_of(point)
        dtype, device = space_of(point)
        self._ends = guarded(lambda: self._counted(point))
        super().__init__((self._ends[-1], self._layout.size), dtype=dtype, device=device)

    def _counted(self, point: Params) -> list[int]:
        """Where the rows of each batch begin, and where those of the last one end."""
        state = self.risk.state()
        known: dict[Any, int] = {}
        ends = [0]
        place = self.risk.place(point, state)
        with grad_enabled(), place, closing(self.risk.terms()) as terms:
            for term in terms:
                shapes = tuple((t.shape, t.dtype) for t in tensors_in(term.data[0]))
                if shapes not in known:
                    data, cutting = (state, *term.data), self._rows.cutting
                    parted = Parted(term.function, point, data, cutting=cutting)
                    known[shapes] = self._rows.count(parted)
                ends.append(ends[-1] + self._share(known[shapes], term))
        return ends

    def _share(self, count: int, term: Term) -> int:
        """How many of the rows that a batch has are rows of this matrix."""
        return count

    def _map_of(self, strategy: HVPStrategy, *, keeps: bool) -> HVPStrategy:
        """What makes the map of a batch, with derivatives taken by ``strategy``."""
        return ByRows(strategy, self._rows, keeps=keeps)

    _averaged = False
    """Whether what a batch gives is multiplied by its weight, and divided by that of all."""

    @property
    def layout(self) -> Layout:
        """Which columns belong to which parameter."""
        return self._layout

    def restricted(self, params: Selection) -> Self:
        """The columns of some of the parameters, in the model's order."""
        part = copy.copy(self)
        part.risk = self.risk.restricted(params)
        part._layout = layout_of(part.risk.parameters())
        LinearOperator.__init__(
            part, (self.shape[0], part._layout.size), dtype=self.torch_dtype, device=self.device
        )
        if self._kept is not None:
            part._kept = self._kept.restricted(part.risk, part._layout)
        return part

    def block(self, cols: Selection) -> Self:
        """The columns of some of the parameters: names, globs, modules, a predicate, as ``params=``."""
        return self.restricted(cols)

    def to_dense(self) -> Tensor:
        """The matrix itself, ``(m, n)``: a pull-back of its batch for each row, in one pass.

        With less columns than rows, a tangent for each column instead.
        """
        m, n = self.shape
        if n < m:
            return super().to_dense()
        dense = torch.zeros(m, n, dtype=working_dtype(self.torch_dtype), device=self.device)

        def fill() -> None:
            place = self._place()
            like, weight = next(iter(place.point.values())), 0.0
            for piece in self._maps(place):
                start, stop = piece.rows.start, piece.rows.stop
                for a in range(start, stop, ROWS_AT_ONCE):
                    b = min(a + ROWS_AT_ONCE, stop)
                    unit = torch.zeros(b - a, stop - start, dtype=like.dtype, device=like.device)
                    unit.diagonal(a - start).fill_(1.0)
                    found = multiplier({ROWS: unit})(piece.linear.pull, self._width(b - a))
                    block = self._counted_in(from_point(found, dense[a:b].T).T, piece.weight)
                    dense[a:b] = block
                weight += piece.weight
            dense.div_(self._divisor(weight))

        with torch.no_grad():
            guarded(lambda: settled(self.strategy, fill))
        return self._finite(dense, None)

    # -- products ---------------------------------------------------------------------------------

    def _apply(self, V: Tensor) -> Tensor:
        def product() -> Tensor:
            place = self._place()
            multiply = multiplier(to_point(V, self._layout, place.point))
            found: list[Tensor] = []
            weight = 0.0
            for piece in self._maps(place):
                rows = multiply(piece.linear.push, self._width(V.shape[1]))[0]
                found.append(self._counted_in(rows.reshape(V.shape[1], -1).to(V), piece.weight))
                weight += piece.weight
            return torch.cat(found, 1).T / self._divisor(weight)

        return self._finite(guarded(lambda: settled(self.strategy, product)), V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        def product() -> Tensor:
            place = self._place()
            like = next(iter(place.point.values()))
            total: list[Tensor] = []
            weight = 0.0
            for piece in self._maps(place):
                multiply = multiplier({ROWS: U[piece.rows].T.contiguous().to(like)})
                found = multiply(piece.linear.pull, self._width(U.shape[1]))
                found = [
                    self._counted_in(t.to(working_dtype(t.dtype)), piece.weight) for t in found
                ]
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
                weight += piece.weight
            return from_point(total, U) / self._divisor(weight)

        return self._finite(guarded(lambda: settled(self.strategy, product)), U, transposed=True)

    def _counted_in(self, part: Tensor, weight: float) -> Tensor:
        """What a batch adds; one that counts nothing may be no number."""
        if not self._averaged:
            return part
        return weight * part if weight else torch.zeros_like(part)

    def _divisor(self, weight: float) -> float:
        return weight if self._averaged and self.risk.average.normalized else 1.0

    def _width(self, k: int) -> int:
        """How many columns are multiplied at once."""
        return k if self._kept is None or k == 1 else self._kept.prepared().columns_at_once()

    def _maps(self, place: Place) -> Generator[Piece, None, None]:
        """One pass: the map of each batch, gone before the next one's is made."""
        around = place.risk.place(place.point, place.state)
        with grad_enabled(), around, closing(self._terms(place)) as terms:
            for (start, stop), (linear, term) in zip(pairwise(self._ends), terms, strict=True):
                made = linear or made_map(self.strategy, place, term)
                if made.rows.count != stop - start:
                    raise RuntimeError(
                        f"{self!r}: a batch had {stop - start} rows when the operator was built, and "
                        f"has {made.rows.count} now; build a new operator"
                    )
                yield Piece(slice(start, stop), made, term.weight)
        place.risk.refuse()

    def _terms(self, place: Place) -> Generator[tuple[RowsMap | None, Term], None, None]:
        """One pass over the data, with the maps that are kept."""
        if self._kept is None:
            with closing(place.risk.terms()) as terms:
                for term in terms:
                    yield None, term
            return
        prepared = self._kept.prepared()
        for part in prepared.parts:
            yield cast(RowsMap | None, part.map), part.term
        for term in prepared.rest():
            yield None, term

    def _place(self) -> Place:
        if self._kept is not None:
            return self._kept.place
        point = self.risk.parameters()
        if layout_of(point) != self._layout:
            raise RuntimeError(
                f"{self!r}: the model's trainable parameters changed since the operator was built; "
                "build a new operator"
            )
        return Place(self.risk, point, self.risk.state())

    def _finite(self, Y: Tensor, V: Tensor | None, *, transposed: bool = False) -> Tensor:
        if not Y.isfinite().all():
            row = int((~Y.isfinite()).any(1).nonzero()[0])
            raise FloatingPointError(
                f"{self!r}: the product is not finite{self._culprit(row, V, transposed)}"
            )
        return Y

    def _culprit(self, row: int, V: Tensor | None, transposed: bool) -> str:
        if V is not None and not V.isfinite().all():
            return "; the vector it multiplies is not"
        for name, parameter in self.risk.parameters().items():
            if not parameter.isfinite().all():
                return f"; parameter {name} is not"
        if transposed:
            return "; parameters and vector are: look for non-finite numbers in the data"
        return f", first in row {row}: look at that sample, as parameters and vector are finite"

    # -- life cycle -------------------------------------------------------------------------------

    def _linearized(self, memory: Memory, done: dict[int, LinearOperator]) -> LinearOperator:
        if self._kept is not None:
            return self
        if id(self) not in done:
            done[id(self)] = guarded(lambda: self._frozen(memory))
        return done[id(self)]

    def _frozen(self, memory: Memory) -> Self:
        """The matrix as it is now; what products need of a batch is kept as far as that fits."""
        frozen, live = copy.copy(self), self._place()
        with torch.inference_mode(False):
            point = {n: p.detach().clone().requires_grad_() for n, p in live.point.items()}
            state = {name: t.detach().clone() for name, t in live.state.items()}
        frozen.risk = self.risk.frozen()
        frozen.strategy = self._chosen.within(lambda one: self._map_of(one, keeps=True))
        frozen._kept = Kept(
            Place(frozen.risk, point, state),
            frozen.strategy,
            budget_in_bytes(memory, self.device),
            self.risk,
            self.risk.fingerprint(),
        )
        return frozen

    def _label(self) -> str:
        name = type(self).__name__
        return name if self._kept is None else f"Linearized{name.removesuffix('Operator')}"

    def is_current(self) -> bool:
        kept = self._kept
        return kept is None or bool(kept.live.fingerprint() == kept.fingerprint)

    def report(self) -> object:
        """The strategy in use, and what is kept."""
        if self._kept is None:
            return f"{self.strategy!r}: live, nothing kept"
        kept = self._kept
        prepared = guarded(lambda: settled(self.strategy, kept.prepared))
        held = sum(part.map is not None for part in prepared.parts)
        return (
            f"{self.strategy!r}: {prepared.batches} batches, maps of {held} kept in "
            f"{prepared.bytes / 2**20:.3g} of {kept.budget / 2**20:.3g} MiB"
        )


class Piece(NamedTuple):
    """A batch on its way through a product."""

    rows: slice
    linear: RowsMap
    weight: float


@dataclass
class Kept:
    """Where a matrix is frozen, and the maps of its batches."""

    place: Place
    strategy: HVPStrategy
    budget: int
    live: EmpiricalRisk
    fingerprint: Any
    preparation: Preparation | None = None

    def prepared(self) -> Preparation:
        """Batches held and maps made, the first time that they are asked for."""
        if self.preparation is None:
            risk, point, state = self.place
            with grad_enabled(), risk.place(point, state):
                prepared = Preparation(risk, self.strategy, point, state, self.budget)
                prepared.build(None)
            self.preparation = prepared
        return self.preparation

    def restricted(self, risk: EmpiricalRisk, layout: Layout) -> Kept:
        _, whole, state = self.place
        point = {name: whole[name] for name in layout.names}
        others = {name: p.detach() for name, p in whole.items() if name not in point}
        return replace(self, place=Place(risk, point, state | others), preparation=None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"preparation": None}  # graphs can be neither copied nor pickled


def made_map(strategy: HVPStrategy, place: Place, term: Term) -> RowsMap:
    """The map of a batch, made now; by rows, as the strategy is."""
    return cast(RowsMap, strategy.linearize(term.function, place.point, place.state, *term.data))
