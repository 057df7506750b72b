"""Which entries of a flat vector belong to which named parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Named blocks of a flat vector, in order.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Layout
    >>> layout = Layout(("weight", "bias"), (torch.Size([2, 2]), torch.Size([2])))
    >>> layout.unflatten(torch.arange(6.0))["bias"]
    tensor([4., 5.])
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many entries each block has."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """How many entries the vector has."""
        return sum(self.sizes)

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Each name with its place in the flat vector."""
        stops = accumulate(self.sizes)
        for name, size, stop in zip(self.names, self.sizes, stops, strict=True):
            yield name, slice(stop - size, stop)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """``(..., n)`` to tensors ``(..., *shape)`` by name; views where the memory allows."""
        if v.ndim == 0 or v.shape[-1] != self.size:
            raise ValueError(
                f"the layout of {self.size} entries expects shape (..., {self.size}), got {tuple(v.shape)}"
            )
        pieces = torch.split(v, list(self.sizes), dim=-1)
        lead = v.shape[:-1]
        return {
            name: piece.reshape(lead + shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def flatten(self, tensors: Iterable[Tensor], lead: int = 0) -> Tensor:
        """The inverse of `unflatten`, for tensors with ``lead`` leading dimensions."""
        return torch.cat([t.reshape(*t.shape[:lead], -1) for t in tensors], dim=-1)
