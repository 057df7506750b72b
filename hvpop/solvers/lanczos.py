"""Lanczos for many columns in lock-step, each with an orthonormal basis of its own Krylov space."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import LinearOperator
from . import checks


class Lanczos:
    """``A Q = Q T + beta q e'`` for each of k start vectors, fully reorthogonalized.

    Attributes
    ----------
    columns : Tensor
        ``(r,)``, the columns still running; what follows has one row for each.
    Q : Tensor
        ``(r, capacity, n)``, of which the first ``steps + 1`` basis vectors are set.
    T : Tensor
        ``(r, capacity, capacity)``, of which the leading block of order ``steps`` is set.
    size : Tensor
        ``(r,)``, a lower bound of ``|A|``.
    invariant : Tensor
        ``(r,)``, whether the Krylov space is exhausted: ``T`` then has exact eigenvalues.
    """

    def __init__(self, A: LinearOperator, V: Tensor) -> None:
        n, k = V.shape
        self.A = A
        self.eps = torch.finfo(V.dtype).eps
        self.steps = self.products = 0
        self.columns = torch.arange(k, device=V.device)
        norms = checks.norms(V)
        self.Q = V.new_zeros(k, 9, n)
        self.Q[:, 0] = (V / torch.where(norms > 0, norms, 1.0)).T
        self.T = V.new_zeros(k, 9, 9)
        self.size = V.new_zeros(k)
        self.invariant = norms == 0

    def step(self) -> None:
        """One more basis vector for every running column: one block product."""
        m = self.steps
        if m + 1 == self.Q.shape[1]:
            self._grow()
        q, basis = self.Q[:, m], self.Q[:, : m + 1]
        W: Tensor = (self.A @ q.T).T
        self.products += self.columns.numel()
        space = self.A.space
        alpha = space.dots(q.T, W.T).to(W)
        for _ in range(2):  # twice makes it orthogonal to rounding
            for i in range(W.shape[0]):
                C = space.inner(basis[i].T, W[i].unsqueeze(1)).to(W)
                W[i].addmv_(basis[i].T, C.squeeze(1), alpha=-1)
        beta = checks.norms(W.T)
        if not bool(beta.isfinite().all()):
            raise FloatingPointError(
                f"Lanczos on {self.A!r}: product {m + 1} is not finite; "
                "look for non-finite entries in the model, the data or the damping"
            )
        self.size = torch.maximum(self.size, torch.hypot(alpha, beta))
        self.invariant = beta <= 10 * self.eps * self.size
        beta = torch.where(self.invariant, 0.0, beta)
        self.T[:, m, m] = alpha
        self.T[:, m, m + 1] = self.T[:, m + 1, m] = beta
        self.Q[:, m + 1] = W / torch.where(self.invariant, 1.0, beta).unsqueeze(1)
        self.steps += 1

    def drop(self, rows: Tensor) -> None:
        """Take leave of some running columns, given as a mask ``(r,)``."""
        if bool(rows.any()):
            for name in ("columns", "Q", "T", "size", "invariant"):
                setattr(self, name, getattr(self, name)[~rows])

    def _grow(self) -> None:
        r, rows, n = self.Q.shape
        capacity = max(min(2 * rows, n + 1), rows + 1)
        Q, T = self.Q.new_zeros(r, capacity, n), self.T.new_zeros(r, capacity, capacity)
        Q[:, :rows], T[:, :rows, :rows] = self.Q, self.T
        self.Q, self.T = Q, T
