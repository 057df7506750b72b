"""Thick-restart block Lanczos: the steps, their state, and the search for copies at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.crossing import working_dtype
from . import probes
from .checkpoint import digest
from .loop import Task
from .results import Eigenpairs, Status

Which = Literal["LA", "SA", "LM", "SM", "BE"]


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
    search: int  # rows known before the search for missed copies, 0 outside of it
    done: bool  # whether that search is over
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
        seed: int,
    ) -> None:
        self.A, self.k, self.which, self.seed = A, k, which, seed
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
        return Krylov(Q, W, 0, X, square, none, square, none, none, 0.0, 0, False, 0, ())

    def price(self, state: Krylov) -> int:
        return max(1, state.X.shape[1])

    def advance(self, state: Krylov, left: int) -> Krylov:
        if state.size + state.X.shape[1] > state.Q.shape[0]:
            state = self._restarted(state, self.keep, state.X)
        X, j = state.X, state.size
        size = j + X.shape[1]
        AX = self.A @ X
        state.Q[j:size], state.W[j:size] = X.T, AX.T
        Q = state.Q[:size].T
        F, C = self._against(AX, Q)
        T = torch.zeros(size, size, dtype=torch.float64)
        T[:j, :j] = state.T
        T[:, j:] = C
        T[j:, :j] = C[:j].T
        T[j:, j:] = (C[j:] + C[j:].T) / 2
        theta, S = torch.linalg.eigh(T)
        norm = max(state.norm, -theta[0].item(), theta[-1].item())
        products = state.products + X.shape[1]
        X, coupling = self._next(F, Q, norm, products)
        grown = replace(state, size=size, X=X, T=T, norm=norm, products=products)
        if state.search:
            return self._searched(grown, coupling)
        return self._ranked(grown, coupling, theta, S)

    def _ranked(self, state: Krylov, coupling: Tensor, theta: Tensor, S: Tensor) -> Krylov:
        """The Ritz pairs; measured, once their estimated residuals are small enough."""
        order = _order(theta, self.which)
        theta, S = theta[order], S[:, order]
        estimates = (coupling @ S[-coupling.shape[1] :]).norm(dim=0)
        worst = estimates[: self.k].max().item() if state.size >= self.k else torch.inf
        history = (*state.history, (state.products, worst))
        state = replace(state, theta=theta, S=S, estimates=estimates, history=history)
        limit, rounding = self.rtol * state.norm, 4 * self.eps * state.norm
        if worst > max(limit, rounding):
            return replace(state, residuals=torch.empty(0))
        residuals = self.measured(state)[1]
        state = replace(state, residuals=residuals, done=state.X.shape[1] == 0)
        return state if state.done or residuals.max() > limit else self._search(state)

    def _search(self, state: Krylov) -> Krylov:
        """Begin to look for copies of eigenvalues, from a random vector outside of what is known."""
        keep = min(self.keep, state.size)
        known = state.Q[: state.size].T @ state.S[:, :keep].to(state.Q)
        fresh = self._random(min(self.block, self.room - keep), "search", state.products)
        state = self._restarted(state, keep, self._orthonormal(fresh, known))
        return replace(state, search=keep, done=state.X.shape[1] == 0)

    def _searched(self, state: Krylov, coupling: Tensor) -> Krylov:
        """One step of the search: the rows from ``search`` on are a Krylov space of their own."""
        b, start = coupling.shape[1], state.search
        mu, S = torch.linalg.eigh(state.T[start:, start:])
        radii = (coupling @ S[-b:]).norm(dim=0)
        # At the ends of the spectrum a Ritz value bounds an eigenvalue; inside only a sharp one counts.
        sure = mu.abs() + radii if self.which == "SM" else mu
        missing = [i for i, value in enumerate(sure.tolist()) if self._enters(state, value)]
        if missing:
            V = state.Q[start : state.size].T @ S[:, missing[-b:]].to(state.Q)
            known = state.Q[: self.k].T
            state = self._restarted(state, self.k, self._orthonormal(V, known))
            return replace(state, search=0, residuals=torch.empty(0))
        # Could a wanted one still come of it? The residual says how far a Ritz value may move, but a
        # start that is nearly orthogonal to what it looks for makes it small at first.
        low, high = mu - _CAUTION * radii, mu + _CAUTION * radii
        inner = torch.minimum(low.clamp_min(0.0), high)  # what is closest to zero
        possible = any(self._enters(state, end) for end in torch.cat([low, high, inner]).tolist())
        spent = mu.shape[0]
        enough = max(2, (state.products - spent) // (6 if possible else 15))
        full = state.size + state.X.shape[1] > state.Q.shape[0]
        return replace(state, done=spent >= enough or full or state.X.shape[1] == 0)

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
        floor = state.estimates[: self.k].max() <= max(0.1 * self.rtol, 4 * self.eps) * state.norm
        return "stagnated" if floor or state.done else None

    def result(self, state: Krylov, status: Status) -> Eigenpairs:
        k = min(self.k, state.theta.shape[0])
        ascending = state.theta[:k].argsort()
        Y = state.Q[: state.S.shape[0]].T @ state.S[:, ascending].to(state.Q)
        residuals, _ = self.measured(state)
        # Eigenvectors found to the same tolerance may add as much as this from outside the search.
        allowed = (1 + self.U.shape[1] ** 0.5) * self.rtol * state.norm
        if status == "converged" and self.U.shape[1] and residuals.max() > allowed:
            status = "stagnated"
        eigenvalues, residuals = state.theta[ascending].to(Y), residuals[ascending].to(Y)
        return Eigenpairs(eigenvalues, Y, residuals, state.products, status, state.history)

    def report(self, state: Krylov) -> str:
        found = int((state.estimates[: self.k] <= self.rtol * state.norm).sum())
        residual = f"residual {state.history[-1][1]:.1e}" if state.history else "start"
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

    def _next(self, F: Tensor, Q: Tensor, norm: float, place: int) -> tuple[Tensor, Tensor]:
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
        if not alive.all():
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
        S = state.S[:, :keep].to(state.Q)
        Q, W = self._buffer(), self._buffer()
        Q[:keep], W[:keep] = S.T @ state.Q[:rows], S.T @ state.W[:rows]
        theta, eye = state.theta[:keep], torch.eye(keep, dtype=torch.float64)
        return replace(
            state, Q=Q, W=W, size=keep, X=X, T=torch.diag(theta), theta=theta, S=eye,
            estimates=state.estimates[:keep],
        )  # fmt: skip

    def measured(self, state: Krylov) -> tuple[Tensor, Tensor]:
        """Norms of ``A y - theta y`` and of its part in the space that is searched."""
        k, rows = min(self.k, state.theta.shape[0]), state.S.shape[0]
        S = state.S[:, :k].to(state.Q)
        theta = state.theta[:k].to(S)
        R = state.W[:rows].T @ S - state.Q[:rows].T @ (S * theta)
        inside = self._searchable(R)
        norms = [torch.linalg.vector_norm(V, dim=0).cpu().double() for V in (R, inside)]
        return norms[0], norms[1]

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
            V = torch.linalg.qr(V)[0]
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
        return {**super().pack(state), **used, "history": [list(pair) for pair in state.history]}

    def unpack(self, saved: Mapping[str, Any]) -> Krylov:
        fields = dict(saved)
        for name in ("Q", "W"):
            buffer = torch.empty(
                self.basis, self.A.shape[0], dtype=self.dtype, device=self.A.device
            )
            buffer[: fields["size"]] = fields[name]
            fields[name] = buffer
        fields["history"] = tuple((count, worst) for count, worst in fields["history"])
        return Krylov(**fields)


_CAUTION = 3.0  # residuals
_RANDOM_PART = 1e-2  # of a warm start


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
