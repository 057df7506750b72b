"""Thick-restart block Lanczos: the steps, their state, and the search for copies at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments, probes
from ..operators.arguments import Seed
from ..operators.checkpoint import Rows, digest
from ..operators.crossing import working_dtype
from ..operators.measured import Measured
from .basis import Complement, Turn, combined
from .copies import Search
from .loop import Task
from .results import Eigenpairs, Status

Which = Literal["LA", "SA", "LM", "SM", "BE"]


@dataclass(frozen=True)
class Krylov:
    """``A Q = Q T + X B`` with orthonormal ``[Q, X]``: ``Q`` has ``size`` rows in use, ``X`` is next.

    Q is shared by successive states, which only write behind each other's rows, until a restart turns
    it in place. What the recurrence has lost of ``A Q`` is known by its size.
    """

    Q: Tensor  # (basis, n), rows are vectors
    restarts: int  # how often Q was turned
    size: int
    X: Tensor  # (n, b), the vectors to multiply next
    T: Tensor  # (size, size), float64 on the host, like all that follows
    border: Tensor  # B, (b, size)
    lost: Tensor  # (size,), the squared length of what is missing in the recurrence of each row
    outside: Tensor  # (d, size), of A Q in the deflated space
    theta: Tensor  # (j,), Ritz values of the first j rows, the most wanted first
    S: Tensor  # (j, j), their vectors in the basis
    estimates: Tensor  # (j,), their residuals by the recurrence
    residuals: Tensor  # (k,), empty while the estimates are too large
    norm: float  # the largest |theta| seen
    search: Search | None  # for copies, once all pairs are found
    pure: bool  # whether the basis is of one Krylov space, from the start
    done: bool  # whether that search is over ...
    rtol: float  # ... and to what tolerance
    renewed: float  # the largest residual where the next vectors were last taken from the residuals
    failed: float  # the largest estimate where the residuals were last measured, and were larger
    stale: bool  # whether to go on from the residuals, which have to be measured for it
    products: int
    history: tuple[tuple[int, float], ...]


class Lanczos(Task[Krylov]):
    name, state_type, vectors = "eigsh", Krylov, ("X",)
    turning: tuple[Turn, Krylov] | None  # the restart made last, and the state after it

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
        self.source = Measured("eigsh", A)
        self.dtype = working_dtype(A.torch_dtype)
        n = A.shape[0]
        self.space, self.turning = A.space, None
        self.v0 = self._columns("v0", v0)
        self.U = self.space.qr(self._columns("deflate", deflate))[0]
        self.complement = Complement(self.space, self.U)
        self.room = n - self.U.shape[1]  # the dimension of the space that is searched
        if which not in get_args(Which):
            raise ValueError(f"eigsh expects which in {get_args(Which)}, got {which!r}")
        arguments.required("eigsh", k=k)
        if k > self.room:
            raise ValueError(f"eigsh expects 1 <= k <= {self.room} for {A!r}, got k={k}")
        arguments.counts("eigsh", block=block, basis=basis)
        arguments.positive("eigsh", rtol=rtol)
        self.block = min(block, self.room)
        wish = _basis(n, k, block) if basis is None else basis
        if wish < k + 2 * block and wish < self.room:
            raise ValueError(f"eigsh expects basis >= k + 2 block = {k + 2 * block}, got {wish}")
        self.basis = min(wish, self.room)
        self.keep = min(k + 2 * (self.basis - k) // 5, self.basis - 2 * self.block)
        self.keep = max(self.keep, k)
        self.eps = torch.finfo(self.dtype).eps
        self.rtol = self.eps**0.5 if rtol is None else rtol

    # -- the steps --------------------------------------------------------------------------------

    def start(self) -> Krylov:
        X = self.complement.orthonormal(self._first())
        none, square = torch.empty(0, dtype=torch.float64), torch.empty(0, 0, dtype=torch.float64)
        return Krylov(
            Q=self.space.empty(self.basis).T, restarts=0, size=0, X=X, T=square,
            border=none.reshape(X.shape[1], 0), lost=none, outside=none.reshape(self.U.shape[1], 0),
            theta=none, S=square, estimates=none, residuals=none, norm=0.0, search=None, pure=True,
            done=False, rtol=0.0, renewed=torch.inf, failed=torch.inf, stale=False, products=0,
            history=(),
        )  # fmt: skip

    def price(self, state: Krylov) -> int:
        return min(self.k, state.theta.shape[0]) if state.stale else max(1, state.X.shape[1])

    def advance(self, state: Krylov, left: int) -> Krylov:
        self.turning = None
        if state.stale:
            return self._renewed(*self._measured(replace(state, stale=False)))
        if state.size + state.X.shape[1] > state.Q.shape[0]:
            state = self._restarted(self._condensed(state), self.keep, state.X)
        X, j, b = state.X, state.size, state.X.shape[1]
        size = j + b
        F = self.source @ X
        state.Q.T[:, j:size] = X  # the other way round torch takes a vector for a transpose
        outside, C, F = self.complement.against(F, state.Q[:size].T, X, state.border)
        T = torch.zeros(size, size, dtype=torch.float64)
        T[:j, :j] = state.T
        T[:, j:] = C
        T[j:, :j] = C[:j].T
        T[j:, j:] = (C[j:] + C[j:].T) / 2
        lost = torch.cat([state.lost, torch.zeros(b, dtype=torch.float64)])
        lost[:j] += (C[:j] - state.border.T).square().sum(1)  # what T says more than the recurrence
        lost[j:] += (C[j:] - C[j:].T).square().sum(1) / 4
        theta, S = _eigen(T, self.which)
        norm = max(state.norm, theta.abs().max().item())
        products = state.products + b
        Q = state.Q[:size].T
        X, coupling = self._next(F, Q, norm, products, fill=state.search is None)
        border = torch.zeros(X.shape[1], size, dtype=torch.float64)
        border[:, j:] = coupling
        grown = replace(
            state, size=size, X=X, T=T, border=border, lost=lost, norm=norm, products=products,
            outside=torch.cat([state.outside, outside], 1),
        )  # fmt: skip
        if state.search is not None:
            search = state.search.followed(coupling, C, self.room)
            return self._searched(replace(grown, search=search))
        return self._ranked(grown, theta, S, left - b)

    def _ranked(self, state: Krylov, theta: Tensor, S: Tensor, left: int) -> Krylov:
        """The Ritz pairs, and their residuals once they seem to be small enough.

        The recurrence tells them, unless it has lost as much as they may be: then products do.
        """
        estimates = (state.border @ S).square().sum(0).sqrt()
        worst = estimates[: self.k].max().item() if state.size >= self.k else torch.inf
        history = (*state.history, (state.products, worst))
        state = replace(
            state, theta=theta, S=S, estimates=estimates, history=history, residuals=torch.empty(0)
        )
        limit, rounding = self.rtol * state.norm, 4 * self.eps * state.norm
        if worst > max(limit, rounding):
            return state
        noise = 50 * self.eps * state.norm  # what rounding may add to the recurrence
        if limit >= noise and bool((self._by_recurrence(state)[1] <= noise).all()):
            return self._judged(replace(state, residuals=estimates[: self.k]), None)
        again = worst <= 0.1 * state.failed or (worst <= self._floor(state) < state.failed)
        if not again or left < self.k:
            return state
        return self._judged(*self._measured(state))

    def _judged(self, state: Krylov, R: Tensor | None) -> Krylov:
        """What to do about the residuals known: search for copies, go on as before, or from ``R``."""
        limit = self.rtol * state.norm
        worst, largest = state.estimates[: self.k].max().item(), state.residuals.max().item()
        state = replace(state, done=state.X.shape[1] == 0)
        if not state.done and largest <= limit:
            return self._search(state)
        held_up = worst <= self._floor(state) and largest > limit and not state.done
        if held_up and R is not None and largest < 0.9 * state.renewed:
            return self._renewed(state, R)
        return state if largest <= limit else replace(state, failed=worst)

    def _by_recurrence(self, state: Krylov) -> tuple[Tensor, Tensor]:
        """The residuals of the wanted pairs in the space that is searched, and the part of them that was lost."""
        k = min(self.k, state.theta.shape[0])
        rows = state.S.shape[0]
        lost = (state.S[:, :k].square().T @ state.lost[:rows]).sqrt()
        return torch.hypot(state.estimates[:k], lost), lost

    def _measured(self, state: Krylov) -> tuple[Krylov, Tensor]:
        """``state`` with its residuals measured, by a product for each; and the residuals ``(n, k)``."""
        rows, k = state.S.shape[0], min(self.k, state.theta.shape[0])
        R = self.space.empty(k)
        for i in range(0, k, self.block):
            S = state.S[:, i : min(i + self.block, k)]
            Y = combined(state.Q[:rows], S)
            AY = self.complement.searchable(self.source @ Y)[1]
            R[:, i : i + self.block] = AY.addcmul_(
                Y, state.theta[i : i + S.shape[1]].to(Y), value=-1
            )
        residuals = self.space.norms(R).cpu()
        return replace(state, residuals=residuals, products=state.products + k), R

    def _floor(self, state: Krylov) -> float:
        """Estimates as small as this beside residuals that are not: these are held up by something else."""
        return max(0.1 * self.rtol, 4 * self.eps) * state.norm

    def _renewed(self, state: Krylov, R: Tensor) -> Krylov:
        """Go on from the residuals themselves: a search leaves no vectors that would reduce them.

        Only the wanted pairs are kept, with as many vectors to multiply next as their residuals have
        directions that are larger than they may be.
        """
        k, renewed = min(self.k, state.theta.shape[0]), state.residuals.max().item()
        Q, triangle = self.space.qr(R)
        V, sizes, _ = torch.linalg.svd(triangle.cpu())
        large = max(1, int((sizes > 0.1 * self.rtol * state.norm).sum()))
        wide = max(self.block, (self.basis - k) // 2)
        X = combined(Q.T, V[:, : min(large, wide, self.room - k)])
        X = self.complement.orthonormal(X, state.Q[: state.S.shape[0]].T, state.S[:, :k], 2)
        return self._restarted(
            state, k, X, search=None, pure=False, done=False, renewed=renewed, failed=torch.inf,
            residuals=torch.empty(0), estimates=state.residuals,
        )  # fmt: skip

    def _search(self, state: Krylov) -> Krylov:
        """Begin to look for copies of eigenvalues, from random vectors outside of what is known."""
        # What the first Krylov space has missed is orthogonal to all of it. A later one may have met it
        # without having found it yet, and only those found are surely orthogonal to it.
        most = max(self.keep, self.basis - 3 * self.block) if state.pure else self.k
        keep = min(most, state.size)
        fresh = self._random(min(self.block, self.room - keep), "search", state.products)
        X = self.complement.orthonormal(fresh, state.Q[: state.size].T, state.S[:, :keep])
        searching = self._begun(state, keep, X.shape[1])
        return self._restarted(
            state, keep, X, search=searching, done=X.shape[1] == 0, rtol=self.rtol
        )

    def _begun(self, state: Krylov, keep: int, b: int) -> Search:
        places = [x for x in self._places(state).tolist() if self._enters(state, x)]
        suspects = torch.tensor(places, dtype=torch.float64)
        c = suspects.shape[0]
        ahead = torch.eye(b, dtype=torch.float64).expand(c, b, b)
        return Search(suspects, ahead.new_zeros(c, keep, b), ahead, state.products)

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
        V = combined(state.Q[self.k : state.size], Y)
        X = self.complement.orthonormal(V, state.Q[: self.k].T)
        return self._restarted(
            state, self.k, X, search=None, pure=False, residuals=torch.empty(0), renewed=torch.inf,
            failed=torch.inf,
        )  # fmt: skip

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
        rows = state.S.shape[0]
        Y = combined(state.Q[:rows], state.S[:, ascending])
        inside = state.residuals if state.residuals.shape[0] == k else self._by_recurrence(state)[0]
        residuals = torch.hypot(
            inside, (state.outside[:, :rows] @ state.S[:, :k]).square().sum(0).sqrt()
        )
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
        Z /= self.space.norms(Z).to(Z)
        if self.v0.shape[1] == 0:
            return Z
        sizes = self.space.norms(self.v0).to(Z)
        for i in range(min(self.block, self.v0.shape[1])):
            Z[:, i] *= _RANDOM_PART
            for c in range(i, self.v0.shape[1], self.block):
                Z[:, i] += self.v0[:, c] / sizes[c]
        return Z

    def _next(
        self, F: Tensor, Q: Tensor, norm: float, place: int, fill: bool
    ) -> tuple[Tensor, Tensor]:
        """The block after ``F``, the part of ``A X`` outside of ``Q``, and their coupling ``(b, b)``.

        Directions that are lost in rounding (an invariant subspace is complete) are replaced by
        random ones, which nothing couples.
        """
        space = self.room - Q.shape[1]
        X, s, Vh = self.complement.principal(F)
        alive = s > 10 * self.eps * norm
        # F is orthogonal to Q, but for rounding in units of F, not of its smallest part
        rounds = 0 if bool((s[alive] > 0.1 * s.max()).all()) else 1
        if not (alive.all() or fill):
            X, s, Vh = X[:, alive.to(X.device)], s[alive], Vh[alive]
        elif not alive.all():
            rounds = 3
            lost = (~alive).nonzero()[:, 0].to(X.device)
            X[:, lost] = self._random(lost.shape[0], "lost", place)
            s = torch.where(alive, s, 0.0)
        X = X[:, :space]
        coupling = (s[:, None] * Vh)[:space]
        return self.complement.orthonormal(X, Q, rounds=rounds), coupling

    def _restarted(self, state: Krylov, keep: int, X: Tensor, **changes: Any) -> Krylov:
        """From the first ``keep`` Ritz vectors and ``X``, in the memory of ``state``, which is spent."""
        rows = state.S.shape[0]
        keep = min(keep, rows)
        S = state.S[:, :keep]
        T = S.T @ state.T[:rows, :rows] @ S  # not quite diagonal, in a search
        linked = X is state.X
        border = state.border[:, :rows] @ S
        lost = S.square().T @ state.lost[:rows]
        full = torch.nn.functional.pad(S, (0, 0, 0, state.size - rows))
        lost = lost + (state.T @ full - full @ T).square().sum(0)
        if not linked:
            lost = lost + border.square().sum(0)
            border = torch.zeros(X.shape[1], keep, dtype=torch.float64)
        fields = {
            "restarts": state.restarts + 1, "size": keep, "X": X, "T": (T + T.T) / 2,
            "border": border, "lost": lost, "outside": state.outside[:, :rows] @ S,
            "theta": state.theta[:keep], "S": torch.eye(keep, dtype=torch.float64),
            "estimates": state.estimates[:keep], **changes,
        }  # fmt: skip
        self.turning = Turn(state.Q, S), replace(state, **fields)
        return self._turned()

    def recovered(self, state: Krylov) -> Krylov:
        if self.turning is None or self.turning[1].restarts <= state.restarts:
            return state
        return self._turned()  # the memory of the state before is gone

    def _turned(self) -> Krylov:
        assert self.turning is not None
        turn, after = self.turning
        turn.finish()
        return after

    def _random(self, count: int, *place: object) -> Tensor:
        return probes.gaussian(self.space, count, "eigsh", self.seed, *place)

    def _columns(self, name: str, V: Tensor | None) -> Tensor:
        n = self.space.n
        if V is None:
            return torch.empty(n, 0, dtype=self.dtype, device=self.A.device)
        if not isinstance(V, Tensor) or V.ndim not in (1, 2) or V.shape[0] != n:
            got = tuple(V.shape) if isinstance(V, Tensor) else type(V).__name__
            cure = "" if isinstance(V, Tensor) else "; use torch.as_tensor"
            raise ValueError(
                f"eigsh expects {name} to be a tensor ({n},) or ({n}, j), got {got}{cure}"
            )
        if V.is_complex():
            raise TypeError(f"eigsh expects {name} with real numbers, got {V.dtype}")
        V = V.detach().to(self.A.device, self.dtype).reshape(n, -1)
        lengths = self.space.largest(V)
        if not torch.isfinite(lengths).all() or (lengths == 0).any():
            raise ValueError(f"eigsh expects {name} with finite columns that are not zero")
        return V

    # -- checkpoint -------------------------------------------------------------------------------

    def settings(self) -> Mapping[str, Any]:
        return {
            "k": self.k, "which": self.which, "block": self.block, "basis": self.basis,
            "seed": self.seed, "v0": digest(self.v0, self.space), "deflate": digest(self.U, self.space),
        }  # fmt: skip

    def pack(self, state: Krylov) -> dict[str, Any]:
        packed = super().pack(state)
        del packed["Q"]
        return packed

    def rows(self, state: Krylov) -> Rows:
        return Rows("Q", state.Q[: state.size], state.restarts)

    def unpack(self, saved: Mapping[str, Any]) -> Krylov:
        Q = self.space.empty(self.basis).T
        saved["Q"].read(Q[: saved["size"]])
        return self._tightened(super().unpack({**saved, "Q": Q}))

    def _tightened(self, state: Krylov) -> Krylov:
        """``state``, ready to go on where it was good enough for a looser tolerance."""
        over = state.done or state.search is not None
        if not over or self.rtol >= state.rtol or state.size == self.room:
            return state
        if state.residuals.max() > self.rtol * state.norm:
            return replace(state, stale=True, done=False, search=None, residuals=torch.empty(0))
        return self._search(replace(state, done=False))


def _basis(n: int, k: int, block: int) -> int:
    """How many vectors to keep: fewer where each is large, as many as a restart needs at least."""
    if n <= 1 << 20:
        return max(20, 2 * k) + 10 * block
    return max(k + max(8, k) + 2 * block, min(max(18, 2 * k) + 2 * block, _KEPT // n))


_KEPT = 1 << 28  # numbers in the basis, as long as that does


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
