"""Thick-restart block Lanczos: the steps, their state, and the search for copies at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.arguments import Seed
from ..operators.crossing import working_dtype
from ..operators.measured import Measured
from . import probes
from .checkpoint import digest
from .loop import Task
from .results import Eigenpairs, Status

Which = Literal["LA", "SA", "LM", "SM", "BE"]


@dataclass(frozen=True)
class Search:
    """What a second Krylov space, begun at random outside of what is found, tells of missing eigenvalues.

    Let ``u`` be a unit eigenvector that is missing, for the eigenvalue ``x``: orthogonal to all that is found,
    and to the Krylov space that it was found in. Then ``Q'u = amplitudes @ a`` and ``X'u = ahead @ a``, where
    ``a`` is its part in the random start, because ``u'A = x u'`` continues them from step to step.
    As ``|Q'u| <= 1``, ``a`` must be small, which for a random start is improbable.
    """

    suspects: Tensor  # (c,), the places x where an eigenvalue may still be missing
    amplitudes: Tensor  # (c, size, b)
    ahead: Tensor  # (c, width of X, b)
    begun: int  # the products before


@dataclass(frozen=True)
class Krylov:
    """``A Q = Q T + X C'`` with orthonormal ``[Q, X]``: ``Q`` has ``size`` rows in use, ``X`` is next.

    Q and W are shared by successive states, which only write behind each other's rows.
    """

    Q: Tensor  # (basis, n), rows are vectors
    W: Tensor  # (basis, n), their products
    size: int
    X: Tensor  # (n, b), the vectors to multiply next
    T: Tensor  # (size, size), float64 on the host, like all that follows
    theta: Tensor  # (j,), Ritz values of the first j rows, the most wanted first
    S: Tensor  # (j, j), their vectors in the basis
    estimates: Tensor  # (j,), their residuals by the recurrence
    residuals: Tensor  # (k,), measured; empty while the estimates are too large
    norm: float  # the largest |theta| seen
    search: Search | None  # for copies, once all pairs are found
    pure: bool  # whether the basis is of one Krylov space, from the start
    done: bool  # whether that search is over ...
    rtol: float  # ... and to what tolerance
    renewed: float  # the largest residual where the next vectors were last taken from the residuals
    products: int
    history: tuple[tuple[int, float], ...]


class Lanczos(Task[Krylov]):
    name = "eigsh"

    def __init__(
        self,
        A: LinearOperator,
        k: int,
        which: Which,
        block: int,
        basis: int | None,
        v0: Tensor | None,
        deflate: Tensor | None,
        rtol: float | None,
        seed: Seed,
    ) -> None:
        self.A, self.k, self.which = A, k, which
        self.seed = arguments.seed("eigsh", seed)
        self.source = Measured("eigsh", A)  # states are in its units; what leaves is not
        self.dtype = working_dtype(A.torch_dtype)
        n = A.shape[0]
        self.v0 = self._columns("v0", v0)
        self.U = torch.linalg.qr(self._columns("deflate", deflate))[0]
        self.room = n - self.U.shape[1]  # the dimension of the space that is searched
        if which not in get_args(Which):
            raise ValueError(f"eigsh expects which in {get_args(Which)}, got {which!r}")
        arguments.counts("eigsh", k=k)
        if k > self.room:
            raise ValueError(f"eigsh expects 1 <= k <= {self.room} for {A!r}, got k={k}")
        arguments.counts("eigsh", block=block, basis=basis)
        arguments.positive("eigsh", rtol=rtol)
        self.block = min(block, self.room)
        wish = max(20, 2 * k) + 10 * block if basis is None else basis
        if wish < k + 2 * block and wish < self.room:
            raise ValueError(f"eigsh expects basis >= k + 2 block = {k + 2 * block}, got {wish}")
        self.basis = min(wish, self.room)
        self.keep = min(k + 2 * (self.basis - k) // 5, self.basis - 2 * self.block)
        self.keep = max(self.keep, k)
        self.eps = torch.finfo(self.dtype).eps
        self.rtol = self.eps**0.5 if rtol is None else rtol

    # -- the steps --------------------------------------------------------------------------------

    def start(self) -> Krylov:
        X = self._orthonormal(self._first())
        none, square = torch.empty(0, dtype=torch.float64), torch.empty(0, 0, dtype=torch.float64)
        Q, W = self._buffer(), self._buffer()
        return Krylov(
            Q, W, 0, X, square, none, square, none, none, 0.0, None, True, False, 0.0, torch.inf, 0, ()
        )  # fmt: skip

    def price(self, state: Krylov) -> int:
        return max(1, state.X.shape[1])

    def advance(self, state: Krylov, left: int) -> Krylov:
        if state.size + state.X.shape[1] > state.Q.shape[0]:
            state = self._restarted(self._condensed(state), self.keep, state.X)
        X, j = state.X, state.size
        size = j + X.shape[1]
        AX = self.source @ X
        state.Q[j:size], state.W[j:size] = X.T, AX.T
        Q = state.Q[:size].T
        F, C = self._against(AX, Q)
        T = torch.zeros(size, size, dtype=torch.float64)
        T[:j, :j] = state.T
        T[:, j:] = C
        T[j:, :j] = C[:j].T
        T[j:, j:] = (C[j:] + C[j:].T) / 2
        theta, S = _eigen(T, self.which)
        norm = max(state.norm, theta.abs().max().item())
        products = state.products + X.shape[1]
        X, coupling = self._next(F, Q, norm, products, fill=state.search is None)
        grown = replace(state, size=size, X=X, T=T, norm=norm, products=products)
        if state.search is not None:
            search = self._followed(state.search, coupling, C)
            return self._searched(replace(grown, search=search))
        return self._ranked(grown, coupling, theta, S)

    def _ranked(self, state: Krylov, coupling: Tensor, theta: Tensor, S: Tensor) -> Krylov:
        """The Ritz pairs; measured, once their estimated residuals are small enough."""
        estimates = (coupling @ S[-coupling.shape[1] :]).norm(dim=0)
        worst = estimates[: self.k].max().item() if state.size >= self.k else torch.inf
        history = (*state.history, (state.products, worst))
        state = replace(state, theta=theta, S=S, estimates=estimates, history=history)
        limit, rounding = self.rtol * state.norm, 4 * self.eps * state.norm
        if worst > max(limit, rounding):
            return replace(state, residuals=torch.empty(0))
        residuals = self.measured(state)[1]
        state = replace(state, residuals=residuals, done=state.X.shape[1] == 0)
        if not state.done and residuals.max() <= limit:
            return self._search(state)
        held_up = worst <= self._floor(state) and residuals.max() > limit and not state.done
        return self._renewed(state) if held_up and self._improves(state) else state

    def _floor(self, state: Krylov) -> float:
        """Estimates as small as this beside residuals that are not: these are held up by something else."""
        return max(0.1 * self.rtol, 4 * self.eps) * state.norm

    def _improves(self, state: Krylov) -> bool:
        return state.residuals.max().item() < 0.9 * state.renewed

    def _renewed(self, state: Krylov) -> Krylov:
        """Go on from the residuals themselves: a search leaves no vectors that would reduce them.

        Those of one Krylov space are parallel, up to ``block``; where the kept ones are not, only the
        wanted are kept, with as many vectors to multiply next as their residuals have directions.
        """
        renewed, k = state.residuals.max().item(), min(self.k, state.theta.shape[0])
        keep = min(self.keep, state.S.shape[0])
        X = self._directions(state, keep)
        if X.shape[1] > self.block:
            keep, X = k, self._directions(state, k)
            X = X[:, : max(self.block, (self.basis - k) // 2)]
        state = self._restarted(state, keep, X)
        return replace(
            state, X=self._orthonormal(X, state.Q[:keep].T, 1)[:, : self.room - keep],
            residuals=torch.empty(0), search=None, pure=False, done=False, renewed=renewed,
            estimates=torch.full((keep,), torch.inf, dtype=torch.float64),
        )  # fmt: skip

    def _directions(self, state: Krylov, count: int) -> Tensor:
        """Of the first ``count`` residuals, as far as they are larger than they may be."""
        R = self._searchable(self._residuals(state, count))
        V, sizes, _ = torch.linalg.svd(R, full_matrices=False)
        large = int((sizes > 0.1 * self.rtol * state.norm).sum())
        directions: Tensor = V[:, : max(1, large)]
        return directions

    def _search(self, state: Krylov) -> Krylov:
        """Begin to look for copies of eigenvalues, from random vectors outside of what is known."""
        # What the first Krylov space has missed is orthogonal to all of it. A later one may have met it
        # without having found it yet, and only those found are surely orthogonal to it.
        most = max(self.keep, self.basis - 3 * self.block) if state.pure else self.k
        keep = min(most, state.size)
        known = state.Q[: state.size].T @ state.S[:, :keep].to(state.Q)
        fresh = self._random(min(self.block, self.room - keep), "search", state.products)
        state = self._restarted(state, keep, self._orthonormal(fresh, known))
        places = [x for x in self._places(state).tolist() if self._enters(state, x)]
        suspects = torch.tensor(places, dtype=torch.float64)
        c, b = suspects.shape[0], state.X.shape[1]
        ahead = torch.eye(b, dtype=torch.float64).expand(c, b, b)
        search = Search(suspects, ahead.new_zeros(c, keep, b), ahead, state.products)
        return replace(state, search=search, done=b == 0, rtol=self.rtol)

    def _places(self, state: Krylov) -> Tensor:
        """Where a missing eigenvalue is to be ruled out: at those found, for copies.

        What is beyond them a random start has itself seen; one that was given has not.
        """
        found = state.theta[: self.k]
        if self.v0.shape[1] == 0:
            return found
        beyond = 1.5 * self.rtol * state.norm
        places = torch.cat([found, found + beyond, found - beyond])
        if self.which in ("LM", "SM"):
            return torch.cat([places, -places])
        return places

    def _followed(self, search: Search, coupling: Tensor, C: Tensor) -> Search:
        """One step on: ``F'u = x X'u - C'Q'u`` for the part ``F`` of ``A X`` outside of ``Q``."""
        amplitudes = torch.cat([search.amplitudes, search.ahead], 1)
        F = search.suspects[:, None, None] * search.ahead - C.T @ amplitudes
        ahead = coupling / (coupling * coupling).sum(1, keepdim=True) @ F
        # P(|M a| <= 1) is at most the density of a at 0 times the volume of that ellipsoid.
        b = ahead.shape[2]
        volumes = torch.linalg.svdvals(torch.cat([amplitudes, ahead], 1)).log().sum(1)
        ball = b / 2 * math.log(math.pi) - math.lgamma(b / 2 + 1)
        possible = ball + b / 2 * math.log(self.room / (2 * math.pi)) - volumes > math.log(_MISSED)
        return replace(
            search, suspects=search.suspects[possible], amplitudes=amplitudes[possible],
            ahead=ahead[possible],
        )  # fmt: skip

    def _searched(self, state: Krylov) -> Krylov:
        """After one step of the search: over, or back to finding what was missing."""
        assert state.search is not None
        mu, Y = _eigen(state.T[self.k :, self.k :], self.which)
        missing = [i for i, value in enumerate(mu.tolist()) if self._enters(state, value)]
        if missing:
            return self._resumed(state, Y[:, missing[: self.block]])
        spent = state.products - state.search.begun
        enough = spent >= max(2, state.search.begun // 15)
        over = (enough and state.search.suspects.shape[0] == 0) or state.X.shape[1] == 0
        return replace(state, done=over)

    def _resumed(self, state: Krylov, Y: Tensor) -> Krylov:
        """Back from a search: a Krylov space of what it has found, outside of the pairs known."""
        V = state.Q[self.k : state.size].T @ Y.to(state.Q)
        state = self._restarted(state, self.k, self._orthonormal(V, state.Q[: self.k].T))
        return replace(state, search=None, pure=False, residuals=torch.empty(0), renewed=torch.inf)

    def _condensed(self, state: Krylov) -> Krylov:
        """In a search, the pairs found as they are, and the best of the rest, ready for a restart."""
        if state.search is None:
            return state
        k, size = self.k, state.size
        mu, Y = _eigen(state.T[k:, k:], self.which)
        S = torch.eye(size, dtype=torch.float64)
        S[k:, k:] = Y
        theta = torch.cat([state.theta[:k], mu])
        amplitudes = S[:, : self.keep].T @ state.search.amplitudes
        search = replace(state.search, amplitudes=amplitudes)
        return replace(state, theta=theta, S=S, search=search)

    def _enters(self, state: Krylov, value: float) -> bool:
        """Whether an eigenvalue ``value`` would change the wanted ones by more than the tolerance."""
        found = state.theta[: self.k]
        both = torch.cat([found, found.new_tensor([value])])
        both = both.sort().values
        wanted = both[_order(both, self.which)][: self.k]
        change = (wanted.sort().values - found.sort().values).abs().max()
        return bool(change > self.rtol * state.norm)

    def verdict(self, state: Krylov) -> Status | None:
        if state.residuals.shape[0] < self.k:
            return None
        if state.residuals.max() <= self.rtol * state.norm:
            return "converged" if state.done else None
        # The estimates go on shrinking where rounding holds the true residuals up.
        floor = state.estimates[: self.k].max() <= self._floor(state)
        return "stagnated" if floor or state.done else None

    def short(self, state: Krylov) -> Status:
        return "max products" if state.search is None else "unresolved copies"

    def result(self, state: Krylov, status: Status) -> Eigenpairs:
        k = min(self.k, state.theta.shape[0])
        ascending = state.theta[:k].argsort()
        Y = state.Q[: state.S.shape[0]].T @ state.S[:, ascending].to(state.Q)
        residuals, _ = self.measured(state)
        # Eigenvectors found to the same tolerance may add as much as this from outside the search.
        allowed = (1 + self.U.shape[1] ** 0.5) * self.rtol * state.norm
        if status == "converged" and self.U.shape[1] and residuals.max() > allowed:
            status = "stagnated"
        unit = self.source.unit
        eigenvalues, residuals = (
            (unit * values[ascending]).to(Y) for values in (state.theta, residuals)
        )
        history = tuple((products, unit * worst) for products, worst in state.history)
        return Eigenpairs(eigenvalues, Y, residuals, state.products, status, history)

    def report(self, state: Krylov) -> str:
        found = int((state.estimates[: self.k] <= self.rtol * state.norm).sum())
        residual = (
            f"residual {self.source.unit * state.history[-1][1]:.1e}" if state.history else "start"
        )
        return f"{residual}, {found} of {self.k} found"

    # -- pieces -----------------------------------------------------------------------------------

    def _first(self) -> Tensor:
        """The start: guesses folded into one block by adding them up, with a random hundredth.

        A sum is the better start for a Krylov space than the guesses side by side: after as many
        products both span about the same, but the space of the sum has one direction to follow.
        The random part keeps a guess that is an invariant subspace from hiding the rest.
        """
        Z = self._random(self.block, "start")
        Z /= torch.linalg.vector_norm(Z, dim=0)
        if self.v0.shape[1] == 0:
            return Z
        V = self.v0 / torch.linalg.vector_norm(self.v0, dim=0)
        for i in range(self.block):
            if i < V.shape[1]:
                Z[:, i] = V[:, i :: self.block].sum(1) + _RANDOM_PART * Z[:, i]
        return Z

    def _next(
        self, F: Tensor, Q: Tensor, norm: float, place: int, fill: bool
    ) -> tuple[Tensor, Tensor]:
        """The block after ``F``, the part of ``A X`` outside of ``Q``, and their coupling ``(b, b)``.

        Directions that are lost in rounding (an invariant subspace is complete) are replaced by
        random ones, which nothing couples.
        """
        space = self.room - Q.shape[1]
        X, R = torch.linalg.qr(F)
        V, s, Vh = torch.linalg.svd(R)
        s, Vh = s.cpu().double(), Vh.cpu().double()
        alive = s > 10 * self.eps * norm
        X, rounds = X @ V, 1  # F is orthogonal to Q, but for rounding in units of A X, not of F
        if not (alive.all() or fill):
            X, s, Vh = X[:, alive.to(X.device)], s[alive], Vh[alive]
        elif not alive.all():
            rounds = 3
            lost = (~alive).nonzero()[:, 0].to(X.device)
            X[:, lost] = self._random(lost.shape[0], "lost", place)
            s = torch.where(alive, s, 0.0)
        X = X[:, :space]
        coupling = (s[:, None] * Vh)[:space]
        return self._orthonormal(X, Q, rounds), coupling

    def _restarted(self, state: Krylov, keep: int, X: Tensor) -> Krylov:
        rows = state.S.shape[0]
        keep = min(keep, rows)
        kept = state.S[:, :keep]
        S = kept.to(state.Q)
        Q, W = self._buffer(), self._buffer()
        Q[:keep], W[:keep] = S.T @ state.Q[:rows], S.T @ state.W[:rows]
        T = kept.T @ state.T[:rows, :rows] @ kept  # not quite diagonal, in a search
        return replace(
            state, Q=Q, W=W, size=keep, X=X, T=(T + T.T) / 2, theta=state.theta[:keep],
            S=torch.eye(keep, dtype=torch.float64), estimates=state.estimates[:keep],
        )  # fmt: skip

    def measured(self, state: Krylov) -> tuple[Tensor, Tensor]:
        """Norms of ``A y - theta y`` and of its part in the space that is searched."""
        R = self._residuals(state, min(self.k, state.theta.shape[0]))
        inside = self._searchable(R)
        norms = [torch.linalg.vector_norm(V, dim=0).cpu().double() for V in (R, inside)]
        return norms[0], norms[1]

    def _residuals(self, state: Krylov, k: int) -> Tensor:
        rows, S = state.S.shape[0], state.S[:, :k].to(state.Q)
        return state.W[:rows].T @ S - state.Q[:rows].T @ (S * state.theta[:k].to(S))

    def _against(self, V: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """``V`` without its part in ``Q`` and the deflated space, and its coefficients in ``Q``."""
        V = self._searchable(V)
        C = Q.T @ V
        V = V - Q @ C
        D = Q.T @ V  # "twice is enough"
        V = V - Q @ D
        return self._searchable(V), (C + D).cpu().double()

    def _searchable(self, V: Tensor) -> Tensor:
        """``V`` without its part in the deflated space."""
        return V - self.U @ (self.U.T @ V) if self.U.shape[1] else V

    def _orthonormal(self, V: Tensor, Q: Tensor | None = None, rounds: int = 3) -> Tensor:
        """An orthonormal basis of ``V``, orthogonal to the deflated space and to ``Q``."""
        for _ in range(rounds if V.shape[1] else 0):
            V = self._searchable(V)
            if Q is not None:
                V = V - Q @ (Q.T @ V)
            V, R = torch.linalg.qr(V)
            V = V * torch.where(R.diagonal() < 0, -1.0, 1.0)  # what is orthonormal stays as it is
        return V

    def _buffer(self) -> Tensor:
        n, device = self.A.shape[0], self.A.device
        return torch.empty(self.basis, n, dtype=self.dtype, device=device)

    def _random(self, count: int, *place: object) -> Tensor:
        n, device = self.A.shape[0], self.A.device
        return probes.gaussian(n, count, self.dtype, device, "eigsh", self.seed, *place)

    def _columns(self, name: str, V: Tensor | None) -> Tensor:
        n = self.A.shape[0]
        if V is None:
            return torch.empty(n, 0, dtype=self.dtype, device=self.A.device)
        if not isinstance(V, Tensor) or V.ndim not in (1, 2) or V.shape[0] != n:
            got = tuple(V.shape) if isinstance(V, Tensor) else type(V).__name__
            raise ValueError(f"eigsh expects {name} to be a tensor ({n},) or ({n}, j), got {got}")
        V = V.detach().to(self.A.device, self.dtype).reshape(n, -1)
        lengths = torch.linalg.vector_norm(V, dim=0)
        if not torch.isfinite(lengths).all() or (lengths == 0).any():
            raise ValueError(f"eigsh expects {name} with finite columns that are not zero")
        return V

    # -- checkpoint -------------------------------------------------------------------------------

    def settings(self) -> Mapping[str, Any]:
        return {
            "k": self.k, "which": self.which, "block": self.block, "basis": self.basis,
            "seed": self.seed, "v0": digest(self.v0), "deflate": digest(self.U),
        }  # fmt: skip

    def pack(self, state: Krylov) -> dict[str, Any]:
        used = {name: getattr(state, name)[: state.size].clone() for name in ("Q", "W")}
        search = None if state.search is None else dict(vars(state.search))
        history = [list(pair) for pair in state.history]
        unit = self.source.unit
        return {**super().pack(state), **used, "search": search, "history": history, "unit": unit}

    def unpack(self, saved: Mapping[str, Any]) -> Krylov:
        fields = dict(saved)
        self.source.unit = fields.pop("unit")
        for name in ("Q", "W"):
            buffer = torch.empty(
                self.basis, self.A.shape[0], dtype=self.dtype, device=self.A.device
            )
            buffer[: fields["size"]] = fields[name]
            fields[name] = buffer
        fields["history"] = tuple((count, worst) for count, worst in fields["history"])
        if fields["search"] is not None:
            fields["search"] = Search(**fields["search"])
        return self._tightened(Krylov(**fields))

    def _tightened(self, state: Krylov) -> Krylov:
        """``state``, ready to go on where it was good enough for a looser tolerance."""
        over = state.done or state.search is not None
        if not over or self.rtol >= state.rtol or state.size == self.room:
            return state
        if state.residuals.max() > self.rtol * state.norm:
            return self._renewed(state)
        return self._search(replace(state, done=False))


_MISSED = 5e-3  # the probability that a search overlooks what is missing
_RANDOM_PART = 1e-2  # of a warm start


def _eigen(T: Tensor, which: Which) -> tuple[Tensor, Tensor]:
    """The eigenpairs of a small matrix, the most wanted first."""
    theta, S = torch.linalg.eigh(T)
    order = _order(theta, which)
    return theta[order], S[:, order]


def _order(theta: Tensor, which: Which) -> Tensor:
    """Indices of ascending ``theta``, the most wanted first."""
    n = theta.shape[0]
    if which == "LA":
        return torch.arange(n - 1, -1, -1)
    if which == "SA":
        return torch.arange(n)
    if which == "LM":
        return theta.abs().argsort(descending=True, stable=True)
    if which == "SM":
        return theta.abs().argsort(stable=True)
    high = torch.arange(n - 1, -1, -1)  # "BE": high, low, high, low, ...
    return torch.stack([high, torch.arange(n)], 1).reshape(-1)[:n]
