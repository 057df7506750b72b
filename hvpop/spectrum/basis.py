"""A basis in the memory that it has: orthogonalized against, turned in place, kept out of a deflated space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import Space


class Complement:
    """The vectors orthogonal to an orthonormal ``U``, ``(n, d)``, in which bases are built."""

    def __init__(self, space: Space, U: Tensor) -> None:
        self.space, self.U = space, U

    def against(
        self, F: Tensor, Q: Tensor, X: Tensor, border: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``F = A X`` without its part in the deflated space and in a ``Q`` that ends in ``X``; those parts first.

        What the recurrence says goes first; the rest is rounding, and one pass over the basis takes it
        ("twice is enough"), unless there was more than the recurrence knew.
        """
        j = Q.shape[1] - X.shape[1]
        outside, F = self.searchable(F)
        C = torch.zeros(Q.shape[1], F.shape[1], dtype=torch.float64)
        C[:j] = border.T
        coupled = border.ne(0).any(0).nonzero()
        if coupled.numel():
            first = int(coupled[0])
            subtract(F, Q[:, first:j], C[first:j])
        C[j:] = self.space.inner(X, F).cpu()
        subtract(F, X, C[j:])
        for _ in range(3):
            D = self.space.inner(Q, F).cpu()
            subtract(F, Q, D)
            C += D
            if bool((D.square().sum(0) <= 1e-2 * self.space.dots(F, F).cpu()).all()):
                break
        return outside, C, self.searchable(F)[1]

    def searchable(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """The part of ``V`` in the deflated space, and ``V`` without it, in its memory."""
        if self.U.shape[1] == 0:
            return torch.zeros(0, V.shape[1], dtype=torch.float64), V
        C = self.space.inner(self.U, V)
        return C.cpu(), subtract(V, self.U, C)

    def orthonormal(
        self, V: Tensor, Q: Tensor | None = None, S: Tensor | None = None, rounds: int = 3
    ) -> Tensor:
        """An orthonormal basis of ``V``, orthogonal to the deflated space and to ``Q S``; takes its memory."""
        for _ in range(rounds if V.shape[1] else 0):
            V = self.searchable(V)[1]
            if Q is not None:
                C = self.space.inner(Q, V).cpu()
                subtract(V, Q, C if S is None else S @ (S.T @ C))
            V = self.space.qr(V)[0]
        return V

    def principal(self, F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``F = X diag(s) Vh``, in the memory of ``F`` where it is one vector."""
        if F.shape[1] == 1:
            s = self.space.norms(F)
            X = F.mul_(torch.where(s > 0, 1 / s, 0.0).to(F))
            return X, s.cpu(), torch.ones(1, 1, dtype=torch.float64)
        X, R = self.space.qr(F)
        V, s, Vh = torch.linalg.svd(R.cpu())
        return combined(X.T, V), s, Vh


@dataclass
class Turn:
    """A restart of ``Q`` in its own memory, written down before it begins: one cut short is finished later."""

    Q: Tensor
    S: Tensor
    at: tuple[int, Tensor | None] = (0, None)
    """A place, and what belongs there if it may not be there."""

    def finish(self) -> None:
        """Turn what is not turned yet."""
        rows, keep = self.S.shape
        S, n = self.S.T.to(self.Q), self.Q.shape[1]
        if not torch.equal(self.S, torch.eye(rows, keep, dtype=self.S.dtype)):
            chunk = max(1024, _CHUNK // rows)
            while self.at[0] < n:
                place, piece = self.at
                stop = min(place + chunk, n)
                if piece is None:
                    piece = S @ self.Q[:rows, place:stop]
                    self.at = (place, piece)
                self.Q[:keep, place:stop] = piece
                self.at = (stop, None)  # an interrupt before this writes the piece once more
        self.at = (n, None)


def combined(Q: Tensor, S: Tensor) -> Tensor:
    """``Q' S`` for rows ``Q``, in memory of its own."""
    return (S.T.to(Q) @ Q).T


def subtract(V: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """``V - Q C``, in the memory of ``V``."""
    C = C.to(V)
    if Q.shape[1] == 1:
        return V.addcmul_(Q, C, value=-1)
    if V.shape[1] == 1:
        V[:, 0].addmv_(Q, C[:, 0], alpha=-1)
        return V
    return V.addmm_(Q, C, alpha=-1)


_CHUNK = 1 << 18  # numbers to turn at a time
