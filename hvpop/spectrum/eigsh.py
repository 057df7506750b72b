"""Eigenvalues at the ends of the spectrum, by thick-restart block Lanczos with honest residuals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..operators import LinearOperator
from . import operand, probes
from .checkpoint import digest
from .loop import Task, run
from .results import Eigenpairs, Status

Which = Literal["LA", "SA", "LM", "SM", "BE"]


def eigsh(
    A: LinearOperator,
    k: int = 6,
    which: Which = "LA",
    *,
    block: int = 1,
    basis: int | None = None,
    v0: Tensor | None = None,
    deflate: Tensor | None = None,
    rtol: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Eigenpairs:
    """Eigenvalues and eigenvectors of a symmetric operator.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, ``(n, n)``.
    k : int
        How many pairs.
    which : {"LA", "SA", "LM", "SM", "BE"}
        Largest or smallest algebraically, largest or smallest in magnitude, or half from both ends
        (one more from the high end if ``k`` is odd). "SM" inside an indefinite spectrum converges
        slowly for want of an inverse.
    block : int
        Columns a product. More columns need fewer passes over the data, but more products, and find
        eigenvalues of a multiplicity up to ``block`` directly.
    basis : int, optional
        Vectors kept, together with their products: the memory is ``2 basis n`` numbers. Default
        ``max(20, 2 k) + 10 block``.
    v0 : Tensor, optional
        Earlier eigenvectors or other guesses, ``(n,)`` or ``(n, j)``; they need not be orthonormal.
    deflate : Tensor, optional
        Known eigenvectors ``(n, d)``; the search runs in their orthogonal complement.
    rtol : float, optional
        A pair counts as found when ``|A v - lambda v| <= rtol |A|``. The default is the square root
        of the machine epsilon: an eigenvalue apart from the others is then exact to rounding,
        because its error goes with the square of the residual.
    max_products : int, optional
        The budget; default ``1000 + 40 k``.
    seed : int
        Of the random start; equal seeds give equal results.
    progress : bool
        Show a bar with the largest residual.
    checkpoint : path, optional
        Save there from time to time and at the end; if the file exists, continue from it.

    Returns
    -------
    Eigenpairs
        Ascending eigenvalues. ``status`` is "converged", "max products", "stagnated" (``rtol`` is
        below what the dtype allows) or "interrupted" (Ctrl-C); then the pairs are the best so far,
        and `residuals` tell how good.

    Notes
    -----
    Lanczos vectors with full orthogonalization, restarted with the best Ritz vectors (Wu and Simon,
    2000). The products ``A Q`` are kept beside ``Q``, so that residuals are measured, not inferred
    from a recurrence. A single-vector Krylov space holds one vector of each eigenspace only: when
    all pairs are found, a fifteenth of the products so far is spent on a search from a new random
    vector in their complement, which goes on if it finds a wanted one.

    Cost: the products, and ``10 n basis`` flops for each.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.spectrum import eigsh
    >>> A = Diagonal(torch.arange(100, dtype=torch.float64))
    >>> found = eigsh(A, k=3)
    >>> found.eigenvalues
    tensor([97., 98., 99.], dtype=torch.float64)
    >>> found.status
    'converged'
    """
    A = operand.symmetric("eigsh", A)
    task = _Lanczos(A, k, which, block, basis, v0, deflate, rtol, seed)
    budget = 1000 + 40 * k if max_products is None else max_products
    operand.positive("eigsh", max_products=budget)
    state, status = run(task, max_products=budget, progress=progress, checkpoint=checkpoint)
    return task.result(state, status)


@dataclass(frozen=True)
class _Krylov:
    """``A Q = Q T + X C'`` with orthonormal ``[Q, X]``: ``Q`` has ``size`` rows in use, ``X`` is next.

    Q and W are shared by successive states, which only write behind each other's rows.
    """

    Q: Tensor  # (basis, n), rows are vectors
    W: Tensor  # (basis, n), their products
    size: int
    X: Tensor  # (n, b), the vectors to multiply next
    T: Tensor  # (size, size), float64 on the host, like all that follows
    theta: Tensor  # (size,), Ritz values, the most wanted first
    S: Tensor  # (size, size), their vectors in the basis
    estimates: Tensor  # (size,), their residuals by the recurrence
    residuals: Tensor  # (k,), measured; empty while the estimates are too large
    norm: float  # the largest |theta| seen
    hunt: int  # products left of the search for missed copies; -1 before it
    products: int
    history: tuple[tuple[int, float], ...]


class _Lanczos(Task[_Krylov]):
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
        self.dtype = operand.working_dtype(A)
        n = A.shape[0]
        self.U = torch.linalg.qr(self._columns("deflate", deflate))[0]
        self.room = n - self.U.shape[1]  # the dimension of the space that is searched
        if which not in get_args(Which):
            raise ValueError(f"eigsh expects which in {get_args(Which)}, got {which!r}")
        if not 1 <= k <= self.room:
            raise ValueError(f"eigsh expects 1 <= k <= {self.room} for {A!r}, got k={k}")
        operand.positive("eigsh", block=block, rtol=rtol)
        self.block = min(block, self.room)
        wish = max(20, 2 * k) + 10 * block if basis is None else basis
        if wish < k + 2 * block and wish < self.room:
            raise ValueError(f"eigsh expects basis >= k + 2 block = {k + 2 * block}, got {wish}")
        self.basis = min(wish, self.room)
        self.keep = min(k + 2 * (self.basis - k) // 5, self.basis - 2 * self.block)
        self.keep = max(self.keep, k)
        self.eps = torch.finfo(self.dtype).eps
        self.rtol = self.eps**0.5 if rtol is None else rtol
        self.v0 = self._columns("v0", v0)

    # -- the steps --------------------------------------------------------------------------------

    def start(self) -> _Krylov:
        n, none = self.A.shape[0], torch.empty(0, dtype=torch.float64)
        Q = torch.zeros(0, n, dtype=self.dtype, device=self.A.device)
        X = self._orthonormal(self._first())
        square = torch.empty(0, 0, dtype=torch.float64)
        buffers = [torch.empty(self.basis, n, dtype=Q.dtype, device=Q.device) for _ in range(2)]
        return _Krylov(*buffers, 0, X, square, none, square, none, none, 0.0, -1, 0, ())

    def price(self, state: _Krylov) -> int:
        return max(1, state.X.shape[1])

    def advance(self, state: _Krylov, left: int) -> _Krylov:
        if state.size + state.X.shape[1] > state.Q.shape[0]:
            state = self._restarted(state, self.keep, state.X)
        X, j = state.X, state.size
        b = X.shape[1]
        AX = self.A @ X
        size = j + b
        state.Q[j:size], state.W[j:size] = X.T, AX.T
        Q = state.Q[:size].T
        F, C = self._against(AX, Q)
        T = torch.zeros(size, size, dtype=torch.float64)
        T[:j, :j] = state.T
        T[:, j:] = C
        T[j:, :j] = C[:j].T
        T[j:, j:] = (C[j:] + C[j:].T) / 2
        theta, S = torch.linalg.eigh(T)
        order = _order(theta, self.which)
        theta, S = theta[order], S[:, order]
        norm = max(state.norm, theta.abs().max().item())
        products = state.products + b
        X, coupling = self._next(F, Q, norm, products)
        estimates = (coupling @ S[j:]).norm(dim=0)
        worst = estimates[: self.k].max().item() if size >= self.k else norm
        new = _Krylov(
            state.Q, state.W, size, X, T, theta, S, estimates, state.residuals, norm,
            state.hunt, products,
            (*state.history, (products, worst)),
        )  # fmt: skip
        return self._examined(new, worst)

    def _examined(self, state: _Krylov, worst: float) -> _Krylov:
        """Where the estimates are small enough: measure, then look for copies that were missed."""
        limit = self.rtol * state.norm
        if state.hunt > 0:
            return self._hunted(state, limit)
        if state.size < self.k or worst > limit:
            return replace(state, residuals=torch.empty(0))
        residuals = self._measured(state)[1]
        state = replace(state, residuals=residuals)
        if residuals.max() > limit:
            return state
        if state.X.shape[1] == 0:
            return replace(state, hunt=0)
        Y = state.Q[: state.size].T @ state.S[:, : self.k].to(state.Q)
        fresh = self._random(min(self.block, self.room - self.k), "hunt", state.products)
        state = self._restarted(state, self.k, self._orthonormal(fresh, Y))
        return replace(state, hunt=max(2, state.products // _HUNT_SHARE))

    def _hunted(self, state: _Krylov, limit: float) -> _Krylov:
        """One step of the search from a random vector; rows up to k are the pairs found before it."""
        k = self.k
        found = state.T.diagonal()[:k]
        change = (state.theta[:k].sort().values - found.sort().values).abs().max()
        if change > limit:  # a wanted one was missing: go on with it
            return replace(state, hunt=-1, residuals=torch.empty(0))
        hunt = 0 if state.X.shape[1] == 0 else max(0, state.hunt - state.X.shape[1])
        if hunt > 0:
            return replace(state, hunt=hunt)
        eye = torch.eye(k, dtype=torch.float64)
        T = state.T[:k, :k]
        return replace(state, size=k, T=T, theta=found, S=eye, estimates=state.residuals, hunt=0)

    def verdict(self, state: _Krylov) -> Status | None:
        if state.residuals.shape[0] < self.k:
            return None
        if state.residuals.max() <= self.rtol * state.norm:
            return "converged" if state.hunt == 0 or state.X.shape[1] == 0 else None
        # The recurrence goes on shrinking where rounding holds the true residual up.
        floor = state.estimates[: self.k].max() <= 0.1 * self.rtol * state.norm
        return "stagnated" if floor or state.X.shape[1] == 0 else None

    def result(self, state: _Krylov, status: Status) -> Eigenpairs:
        k = min(self.k, state.size)
        ascending = state.theta[:k].argsort()
        Y = state.Q[: state.size].T @ state.S[:, ascending].to(state.Q)
        residuals, _ = self._measured(state)
        to = {"dtype": self.dtype, "device": self.A.device}
        return Eigenpairs(
            state.theta[ascending].to(**to),  # type: ignore[call-overload]
            Y,
            residuals[ascending].to(**to),  # type: ignore[call-overload]
            state.products,
            status,
            state.history,
        )

    def report(self, state: _Krylov) -> str:
        found = int((state.estimates[: self.k] <= self.rtol * state.norm).sum())
        return f"residual {state.history[-1][1]:.1e}, {found} of {self.k} found"

    # -- pieces -----------------------------------------------------------------------------------

    def _first(self) -> Tensor:
        """The start: guesses folded into one block by adding them up, with a random tenth.

        A sum is the better start for a Krylov space than the guesses side by side: after as many
        products both span about the same, but the space of the sum has one direction to follow.
        The random part keeps a guess that is an invariant subspace from hiding the rest.
        """
        Z = self._random(self.block, "start")
        Z = Z / torch.linalg.vector_norm(Z, dim=0)
        if self.v0.shape[1] == 0:
            return Z
        V = self.v0.to(self.dtype)
        lengths = torch.linalg.vector_norm(V, dim=0)
        if not torch.isfinite(lengths).all() or (lengths == 0).any():
            raise ValueError("eigsh expects v0 with finite columns that are not zero")
        V = V / lengths
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
        s, Vh = s.double().cpu(), Vh.double().cpu()
        alive = s > 10 * self.eps * norm
        X = X @ V
        if not alive.all():
            lost = (~alive).nonzero()[:, 0].to(X.device)
            X[:, lost] = self._random(lost.shape[0], "lost", place)
            s = torch.where(alive, s, 0.0)
        X = X[:, :space]
        coupling = (s[:, None] * Vh)[:space]
        return self._orthonormal(X, Q), coupling

    def _restarted(self, state: _Krylov, keep: int, X: Tensor) -> _Krylov:
        keep = min(keep, state.size)
        S = state.S[:, :keep].to(state.Q)
        Q, W = torch.empty_like(state.Q), torch.empty_like(state.W)
        Q[:keep], W[:keep] = S.T @ state.Q[: state.size], S.T @ state.W[: state.size]
        theta, eye = state.theta[:keep], torch.eye(keep, dtype=torch.float64)
        return replace(
            state, Q=Q, W=W, size=keep, X=X, T=torch.diag(theta), theta=theta, S=eye,
            estimates=state.estimates[:keep],
        )  # fmt: skip

    def _measured(self, state: _Krylov) -> tuple[Tensor, Tensor]:
        """Norms of ``A y - theta y`` and of its part in the space that is searched."""
        k = min(self.k, state.size)
        S = state.S[:, :k].to(state.Q)
        theta = state.theta[:k].to(state.Q)
        R = state.W[: state.size].T @ S - state.Q[: state.size].T @ (S * theta)
        inside = R - self.U @ (self.U.T @ R)
        norms = [torch.linalg.vector_norm(V, dim=0).double().cpu() for V in (R, inside)]
        return norms[0], norms[1]

    def _against(self, V: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """``V`` without its part in ``Q`` and the deflated space, and its coefficients in ``Q``."""
        V = V - self.U @ (self.U.T @ V)
        C = Q.T @ V
        V = V - Q @ C
        D = Q.T @ V  # "twice is enough"
        V = V - Q @ D
        return V - self.U @ (self.U.T @ V), (C + D).double().cpu()

    def _orthonormal(self, V: Tensor, Q: Tensor | None = None) -> Tensor:
        """An orthonormal basis of ``V``, orthogonal to the deflated space and to ``Q``."""
        for _ in range(3 if V.shape[1] else 0):
            V = V - self.U @ (self.U.T @ V)
            if Q is not None:
                V = V - Q @ (Q.T @ V)
            V = torch.linalg.qr(V)[0]
        return V

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
        return V.detach().to(self.A.device, self.dtype).reshape(n, -1)

    # -- checkpoint -------------------------------------------------------------------------------

    def settings(self) -> Mapping[str, Any]:
        return {
            "k": self.k, "which": self.which, "block": self.block, "basis": self.basis,
            "seed": self.seed, "v0": digest(self.v0), "deflate": digest(self.U),
        }  # fmt: skip

    def pack(self, state: _Krylov) -> dict[str, Any]:
        used = {name: getattr(state, name)[: state.size].clone() for name in ("Q", "W")}
        return {**super().pack(state), **used, "history": [list(pair) for pair in state.history]}

    def unpack(self, saved: Mapping[str, Any]) -> _Krylov:
        fields = dict(saved)
        for name in ("Q", "W"):
            buffer = torch.empty(
                self.basis, self.A.shape[0], dtype=self.dtype, device=self.A.device
            )
            buffer[: fields["size"]] = fields[name]
            fields[name] = buffer
        fields["history"] = tuple((count, worst) for count, worst in fields["history"])
        return _Krylov(**fields)


_RANDOM_PART = 1e-2  # of a warm start
_HUNT_SHARE = 15  # one product in so many is spent on the search for missed copies


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
