"""Vectors held in parts by several processes: the same solvers, by another space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operators import BatchForms, LinearOperator, Space
from ..operators.algebra import Composite
from ..operators.crossing import working_dtype
from .models import ShardedModelHessian
from .team import Team, init


class Sharded(Composite):
    """An operator of vectors of which each process holds a part, the same rows of all of them.

    The solvers and estimates of hvpop work on it as on any other: what they keep is then the part of
    this process, and all sums over entries are sums over processes. Their results are parts, too:
    ``S.space.whole`` puts those of all processes together.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, and the same on every process: a `DataParallel`, or one that each can multiply alone.
    team : Team, optional
        That of ``A``, or of `init`.

    Attributes
    ----------
    space : Space
        ``space.own(V)`` is the part of whole vectors that belongs to this process.

    Notes
    -----
    For a product the parts are gathered and the result cut: two whole blocks ``(n, k)`` for as long as
    it takes. What a solver keeps (a Krylov basis) falls as one over the number of processes.
    Decisions come from sums with the same bits on all processes, and so they are the same.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal, Identity
    >>> from hvpop.distributed import Sharded
    >>> from hvpop.solvers import cg
    >>> S = Sharded(Diagonal(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    >>> b = S.space.own(torch.ones(2, 1, dtype=torch.float64))
    >>> S.space.whole(cg(S + Identity.like(S), b).x)
    tensor([[0.5000],
            [0.2500]], dtype=torch.float64)
    """

    def __init__(self, A: LinearOperator, team: Team | None = None) -> None:
        if not isinstance(A, LinearOperator) or not A.symmetric:
            raise TypeError(
                f"Sharded expects a symmetric operator of hvpop, got {A!r}; shard the operator that "
                "is to be multiplied, and build what is made of it from that"
            )
        super().__init__((A,), A.shape, symmetric=True)
        known: Any = A
        self.team: Team = team or getattr(known, "team", None) or init()
        dtype = working_dtype(A.torch_dtype)
        self._space = SharedSpace(self.team, A.shape[0], dtype, self.device)

    @property
    def space(self) -> Space:
        return self._space

    @property
    def held(self) -> tuple[int, int]:
        return self._space.n, self._space.n

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        if isinstance(A := self.parts[0], ShardedModelHessian):
            return A.multiply(V, self._space)
        return self._space.own(self.parts[0]._apply(self._space.whole(V)))

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms | None:
        return self.parts[0]._batch_forms(self._space.whole(V), batches)


class SharedSpace(Space):
    """A `Space` of vectors of ``order`` entries, of which ``n`` in a row are held here."""

    shared = True

    def __init__(
        self,
        team: Team,
        order: int,
        dtype: torch.dtype,
        device: torch.device,
        n: int | None = None,
    ) -> None:
        self._team = team
        self._most = -(-order // team.size)  # entries that a process holds, but for the last ones
        begin, end = (min(order, r * self._most) for r in (team.rank, team.rank + 1))
        self._rows = slice(begin, end)
        super().__init__(end - begin if n is None else n, dtype, device)
        self.order = order

    def sized(self, n: int) -> Space:
        if n == self.n:
            return self
        return SharedSpace(self._team, self.order, self.dtype, self.device, n)

    # -- vectors ----------------------------------------------------------------------------------

    def random(self, fill: Callable[[Tensor], object], count: int, skip: int = 0) -> Tensor:
        V = self.empty(count)
        whole = torch.empty(self.order, dtype=self.dtype, device=self.device)
        for i in range(-skip, count):
            fill(whole)  # the same numbers for any number of processes
            V[:, max(i, 0)] = whole[self._rows]
        return V

    def own(self, V: Tensor) -> Tensor:
        return V[self._rows].T.clone(memory_format=torch.contiguous_format).T

    def whole(self, V: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return self.rows(V, 0, self.order)
        part = V.new_zeros(V.shape[1], self._most)
        part[:, : V.shape[0]] = V.T
        parts = self._team.side_by_side(part)  # (size, k, most)
        return parts.transpose(0, 1).reshape(V.shape[1], -1)[:, : self.order].T

    def rows(self, V: Tensor, start: int, stop: int) -> Tensor:
        """Some rows of whole vectors, on all processes.

        Piece by piece into its place: of what it gathers gloo makes a copy for each of its threads.
        """
        rows = V.new_empty(V.shape[1], stop - start)
        mine = self._overlap(self._team.rank, start, stop)
        first = self._rows.start
        rows[:, mine.start - start : mine.stop - start] = V[
            mine.start - first : mine.stop - first
        ].T
        for row in rows:
            for rank in range(self._team.size):
                its = self._overlap(rank, start, stop)
                if its.start < its.stop:
                    self._team.share(row[its.start - start : its.stop - start], rank)
        return rows.T

    def put(self, V: Tensor, start: int, rows: Tensor) -> None:
        mine, first = self._overlap(self._team.rank, start, start + len(rows)), self._rows.start
        V[mine.start - first : mine.stop - first] = rows[mine.start - start : mine.stop - start]

    def _overlap(self, rank: int, start: int, stop: int) -> slice:
        """Which of some rows a process holds."""
        begin, end = (min(self.order, r * self._most) for r in (rank, rank + 1))
        low = min(max(start, begin), max(end, begin))
        return slice(low, max(low, min(stop, end)))

    # -- what processes say -----------------------------------------------------------------------

    @property
    def leads(self) -> bool:  # type: ignore[override]
        return bool(self._team.rank == 0)

    def told(self, thing: Any = None) -> Any:
        found = self._team.command(thing)
        return thing if self.leads else found

    def given(self, v: Tensor) -> Tensor:
        return self._team.share(v, 0)

    # -- sums -------------------------------------------------------------------------------------

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        return self._team.add_up(self._here.inner(X, Y))

    def together(
        self, *pairs: tuple[Tensor, Tensor], first: Callable[[slice], object] | None = None
    ) -> list[Tensor]:
        return list(self._team.add_up(torch.stack(self._here.together(*pairs, first=first))))

    def largest(self, X: Tensor) -> Tensor:
        return self._team.largest(self._here.largest(X))

    def every(self, condition: Tensor) -> bool:
        return self._all(bool(condition.all()))

    def finite(self, X: Tensor) -> bool:
        return self._all(self._here.sized(len(X)).finite(X))

    def _all(self, here: bool) -> bool:
        said = torch.tensor([float(here)], device=self.device)
        return bool(self._team.smallest(said))

    @property
    def _here(self) -> Space:
        return Space(self.n, self.dtype, self.device)

    # -- bases ------------------------------------------------------------------------------------

    def qr(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """By orthonormal bases of the parts, then of what they have in common (Demmel et al., 2012)."""
        k = X.shape[1]
        if k == 0:
            return X, torch.zeros(0, 0, dtype=torch.float64, device=X.device)
        Q, R = self._here.qr(X)
        own = torch.zeros(k, k, dtype=torch.float64, device=X.device)
        own[: R.shape[0]] = R
        factors = self._team.side_by_side(own)  # (size, k, k)
        S, R = torch.linalg.qr(factors.reshape(-1, k))
        signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
        mine = (S * signs).reshape(-1, k, k)[self._team.rank, : Q.shape[1]]
        return self._here._times(Q, [mine]), signs[:, None] * R
