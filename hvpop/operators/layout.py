"""Which entries of a flat vector belong to which named parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .wording import counted, some


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
        if not isinstance(v, Tensor):
            raise TypeError(
                f"unflatten expects a tensor, got {type(v).__name__}; use torch.as_tensor"
            )
        if v.ndim == 0 or v.shape[-1] != self.size:
            columns = v.ndim == 2 and v.shape[0] == self.size
            raise ValueError(
                f"the layout of {self.size} entries expects shape (..., {self.size}), got "
                f"{tuple(v.shape)}" + ("; unflatten V.T for columns" if columns else "")
            )
        pieces = torch.split(v, list(self.sizes), dim=-1)
        lead = v.shape[:-1]
        return {
            name: piece.reshape(lead + shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def flatten(
        self, tensors: Mapping[str, Tensor] | Iterable[Tensor], lead: int | None = None
    ) -> Tensor:
        """The inverse of `unflatten`: gradients, say, as one vector, on the first one's device.

        Parameters
        ----------
        tensors
            ``(..., *shape)``, as a mapping by name, in any order, or one for each of `names`, in
            their order.
        lead
            How many dimensions there are in front of each shape; None finds out.

        Returns
        -------
        Tensor
            ``(..., n)``; autograd goes through it.

        Raises
        ------
        ValueError, TypeError
            For names that are missing or unknown, other shapes, None in place of a tensor.

        Examples
        --------
        >>> import torch
        >>> from hvpop import HessianOperator
        >>> model = torch.nn.Linear(2, 1)
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(torch.ones(3, 2), torch.ones(3, 1))])
        >>> model(torch.tensor([[2.0, 3.0]])).sum().backward()
        >>> H.layout.flatten([p.grad for p in model.parameters()])
        tensor([2., 3., 1.])
        >>> H.layout.flatten({"bias": torch.ones(1), "weight": torch.zeros(1, 2)})
        tensor([0., 0., 1.])
        """
        given = self._in_order(tensors)
        in_order = not isinstance(tensors, Mapping)
        for name, shape, t in zip(self.names, self.shapes, given, strict=True):
            _check(name, shape, t, lead, self.names if in_order else ())
        shared = given[0].shape[: given[0].ndim - len(self.shapes[0])]
        for name, shape, t in zip(self.names, self.shapes, given, strict=True):
            if t.shape != shared + shape:
                raise ValueError(
                    "flatten expects the same dimensions in front of every shape, got "
                    f"{_text(shared)} for {self.names[0]!r} and "
                    f"{_text(t.shape[: t.ndim - len(shape)])} for {name!r}"
                )
        flat = [
            _plain(t, given[0]).reshape(*shared, size)
            for t, size in zip(given, self.sizes, strict=True)
        ]
        return torch.cat(flat, dim=-1)

    def _in_order(self, tensors: Mapping[str, Tensor] | Iterable[Tensor]) -> list[Tensor]:
        if isinstance(tensors, Tensor):
            raise TypeError(
                "flatten expects a mapping by name or a list of tensors, got one tensor of shape "
                f"{_text(tensors.shape)}; its inverse is unflatten"
            )
        if not isinstance(tensors, Mapping):
            given = list(tensors)
            if len(given) != len(self.names):
                raise ValueError(
                    f"flatten expects {counted(len(self.names), 'tensor')}, in the order "
                    f"{some(self.names)}, got {len(given)}; give a mapping by name"
                )
            return given
        missing = [name for name in self.names if name not in tensors]
        unknown = [name for name in tensors if name not in self.names]
        if missing or unknown:
            wrong = [f"none for {some(missing)}"] if missing else []
            wrong += [f"also {some(unknown)}"] if unknown else []
            raise ValueError(
                f"flatten expects a tensor for each of {some(self.names)}, got {' and '.join(wrong)}"
                "; for a choice of them: {name: tensors[name] for name in layout.names}"
            )
        return [tensors[name] for name in self.names]


def _check(
    name: str, shape: torch.Size, t: Any, lead: int | None, in_order: tuple[str, ...]
) -> None:
    if t is None:
        raise ValueError(
            f"flatten expects a tensor for {name!r}, got None, which is no gradient at all: the "
            "loss does not reach that parameter, or backward() has not run; give zeros of shape "
            f"{_text(shape)} if it does not"
        )
    if not isinstance(t, Tensor):
        raise TypeError(
            f"flatten expects a tensor for {name!r}, got {type(t).__name__}; use torch.as_tensor"
        )
    before = t.ndim - len(shape) if lead is None else lead
    if before < 0 or t.shape[before:] != shape:
        raise ValueError(
            f"flatten expects shape {_text(shape)}{' after leading dimensions' if lead else ''} "
            f"for {name!r}, got {_text(t.shape)}"
            + (f"; the order is {some(in_order)}: or give a mapping by name" if in_order else "")
        )


def _plain(t: Tensor, first: Tensor) -> Tensor:
    """Dense, as the gradients of embeddings may not be, and on the device of the first."""
    dense = t if t.layout is torch.strided else t.to_dense()
    return dense if dense.device == first.device else dense.to(first.device)


def _text(shape: torch.Size) -> str:
    return str(tuple(shape))
