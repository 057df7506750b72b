"""Rows of the identity: picking some entries of a vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import LinearOperator


class Restriction(LinearOperator):
    """``S v = v[index]``; its transpose puts the entries back and fills up with zeros.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Restriction
    >>> S = Restriction(torch.tensor([2, 0]), 3)
    >>> S @ torch.tensor([10.0, 11.0, 12.0], dtype=torch.float64)
    tensor([12., 10.], dtype=torch.float64)
    >>> S.T @ torch.tensor([1.0, 2.0], dtype=torch.float64)
    tensor([2., 0., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        index: Tensor,
        n: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        given = torch.as_tensor(index)
        if given.numel() and (given.dtype is torch.bool or given.is_floating_point()):
            raise TypeError(
                f"Restriction expects integers, got {given.dtype}; of a mask they are "
                "mask.nonzero().squeeze(1)"
            )
        self.index = given.to(device, torch.int64, copy=True)
        if self.index.ndim != 1 or (
            self.index.numel() and not (0 <= int(self.index.min()) <= int(self.index.max()) < n)
        ):
            raise ValueError(
                f"Restriction expects indices from 0 to {n - 1}, shape (m,), got {index}"
            )
        super().__init__((self.index.numel(), n), dtype=dtype, device=device)

    def _apply(self, V: Tensor) -> Tensor:
        return V[self.index]

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return U.new_zeros(self.shape[1], U.shape[1]).index_add_(0, self.index, U)


def picked(A: LinearOperator, names: Sequence[str]) -> Restriction:
    """The restriction to the entries of some of an operator's parameters, in the order of ``names``."""
    assert A.layout is not None
    places = dict(A.layout.slices())
    index = torch.cat([torch.arange(places[n].start, places[n].stop) for n in names])
    return Restriction(index, A.layout.size, dtype=A.torch_dtype, device=A.device)
