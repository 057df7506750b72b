"""What products with any vectors tell of a whole matrix, and which are left to know all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import LinearOperator
from .sketch import extend


@dataclass(frozen=True)
class Known:
    """``A`` on the span of an orthonormal ``Q``: with ``n`` columns, ``A = AQ Q'``."""

    Q: Tensor  # (n, r)
    AQ: Tensor  # (m, r)

    @staticmethod
    def nothing(A: LinearOperator, dtype: torch.dtype) -> Known:
        AQ, Q = (torch.empty(size, 0, dtype=dtype, device=A.device) for size in A.shape)
        return Known(Q, AQ)

    @property
    def count(self) -> int:
        """How many directions are known."""
        return self.Q.shape[1]

    def learned(self, V: Tensor, Y: Tensor) -> Known:
        """With the products ``Y = A V``; unchanged where they tell less than a direction a column."""
        if self.count + V.shape[1] > V.shape[0]:
            return self
        E, C, R = extend(self.Q, V)
        if not _independent(R, V):
            return self
        AE = torch.linalg.solve_triangular(R, Y - self.AQ @ C, upper=True, left=False)
        return Known(torch.cat([self.Q, E], 1), torch.cat([self.AQ, AE], 1))

    def adds(self, V: Tensor) -> bool:
        """Whether every column of ``V`` has a direction that is not known."""
        return self.count + V.shape[1] <= V.shape[0] and _independent(extend(self.Q, V)[2], V)

    def completed(self, A: LinearOperator, count: int) -> Known:
        """After ``count`` products more, with unit vectors as far as they are new."""
        n, r = self.Q.shape
        count = min(count, n - r)
        V = torch.zeros(n, count, dtype=self.Q.dtype, device=self.Q.device)
        V.diagonal(-r).fill_(1.0)
        E, _, _ = extend(self.Q, V) if r else (V, V, V)
        return Known(torch.cat([self.Q, E], 1), torch.cat([self.AQ, A @ E], 1))


def _independent(R: Tensor, V: Tensor) -> bool:
    """Whether the columns of ``V`` have enough outside of what is known, ``R``, for more digits than half."""
    allowed = torch.finfo(V.dtype).eps ** 0.5 * torch.linalg.vector_norm(V, dim=0)
    return bool((R.diagonal().abs() > allowed).all())
