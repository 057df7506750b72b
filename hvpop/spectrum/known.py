"""What products with any vectors tell of a whole matrix, and which are left to know all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import LinearOperator, Space
from .sketch import beside, extend


@dataclass(frozen=True)
class Known:
    """``A`` on the span of an orthonormal ``Q``: with ``n`` columns, ``A = AQ Q'``."""

    Q: Tensor  # (n, r)
    AQ: Tensor  # (m, r)

    @staticmethod
    def nothing(A: LinearOperator, dtype: torch.dtype) -> Known:
        AQ, Q = (torch.empty(size, 0, dtype=dtype, device=A.device) for size in A.held)
        return Known(Q, AQ)

    @property
    def count(self) -> int:
        """How many directions are known."""
        return self.Q.shape[1]

    def learned(self, V: Tensor, Y: Tensor) -> Known:
        """With the products ``Y = A V``; unchanged where they tell less than a direction a column."""
        if self.count + V.shape[1] > V.shape[0]:
            return self
        space = Space.of(V)
        E, C, R = extend(space, self.Q, V)
        if not _independent(space, R, V):
            return self
        AE = torch.linalg.solve_triangular(R.to(Y), Y - self.AQ @ C.to(Y), upper=True, left=False)
        return Known(beside(self.Q, E), beside(self.AQ, AE))

    def adds(self, V: Tensor) -> bool:
        """Whether every column of ``V`` has a direction that is not known."""
        space = Space.of(V)
        fits = self.count + V.shape[1] <= V.shape[0]
        return fits and _independent(space, extend(space, self.Q, V)[2], V)

    def completed(self, A: LinearOperator, count: int) -> Known:
        """After ``count`` products more, with unit vectors as far as they are new."""
        n, r = self.Q.shape
        count = min(count, n - r)
        V = torch.zeros(n, count, dtype=self.Q.dtype, device=self.Q.device)
        V.diagonal(-r).fill_(1.0)
        E, _, _ = extend(A.space, self.Q, V) if r else (V, V, V)
        return Known(beside(self.Q, E), beside(self.AQ, A @ E))


def _independent(space: Space, R: Tensor, V: Tensor) -> bool:
    """Whether the columns of ``V`` have enough outside of what is known, ``R``, for more digits than half."""
    allowed = torch.finfo(V.dtype).eps ** 0.5 * space.norms(V)
    return bool((R.diagonal().abs() > allowed).all())
