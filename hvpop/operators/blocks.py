"""Operators side by side on the diagonal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .algebra import Composite, require_operators
from .base import LinearOperator


class BlockDiagonal(Composite):
    """``diag(A, B, ...)``: each block acts on its own stretch of the vector.

    Examples
    --------
    >>> import torch
    >>> from hvpop import BlockDiagonal, Dense, Identity
    >>> A = BlockDiagonal([Identity(2, dtype=torch.float32), Dense(torch.ones(1, 2))])
    >>> A @ torch.tensor([1.0, 2.0, 3.0, 4.0])
    tensor([1., 2., 7.])
    """

    def __init__(self, blocks: Iterable[LinearOperator]) -> None:
        parts = tuple(blocks)
        if not parts:
            raise ValueError("BlockDiagonal expects at least one block, got none")
        require_operators("BlockDiagonal", parts)
        shape = (sum(part.shape[0] for part in parts), sum(part.shape[1] for part in parts))
        super().__init__(parts, shape, symmetric=all(part.symmetric for part in parts))

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        pieces = torch.split(V, [part.shape[1] for part in self.parts])
        return torch.cat([part._apply(v) for part, v in zip(self.parts, pieces, strict=True)])

    def _apply_transpose(self, U: Tensor) -> Tensor:
        pieces = torch.split(U, [part.shape[0] for part in self.parts])
        return torch.cat(
            [part._apply_transpose(u) for part, u in zip(self.parts, pieces, strict=True)]
        )
