"""How a batch is made of samples: how many it holds, a part of it, two of them put together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from .batches import DESCEND, arrays_in, arrays_inside, mapped

CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
"""What is the same for every sample, unless a list holds one of them for each."""


class DoesNotFitError(ValueError):
    """A batch that is not made of samples in the way that a `Reading` supposes."""


@dataclass(frozen=True)
class Reading:
    """One way of taking a batch for a number of samples.

    Every array must run over the samples along its first dimension (or one of the first two), every
    list must hold one item for each, or nothing but what all samples share.
    """

    name: str
    lists: bool = False  # a list is one of samples, not of arrays that run over them
    dims: tuple[int, ...] = (0,)  # along which of these an array may run over the samples
    strict: bool = True  # no list of constants of another length

    def count(self, batch: Any) -> int | None:
        """The number of samples; None if the batch is not made so."""
        if self is COLUMNS and type(batch) in (tuple, list):  # usual: at a tenth of the cost
            sizes = {t.size(0) if type(t) is Tensor and t.ndim else None for t in batch}
            if len(sizes) == 1 and None not in sizes:
                return sizes.pop()
        return next((n for n in self._candidates(batch) if self._fits(batch, n)), None)

    def part(self, batch: Any, rows: slice) -> Any:
        """The samples of a batch that are in ``rows``."""
        return self._replaced(
            batch, self._expected(batch), lambda piece, dim: _cut(piece, dim, rows)
        )

    def joined(self, first: Any, second: Any) -> Any:
        """The samples of two batches in one.

        Raises
        ------
        DoesNotFitError
            If they differ in anything but their samples.
        """
        n, m = self._expected(first), self._expected(second)
        if self._shared(first, n) != self._shared(second, m):
            raise DoesNotFitError("the batches differ in more than their samples")
        others = iter(self._pieces(second, m))
        return self._replaced(first, n, lambda piece, dim: _put_together(piece, next(others), dim))

    def _candidates(self, batch: Any) -> Iterator[int]:
        if self.name == "rows":
            yield from [len(batch)] if _is_list(batch) else []
        elif self.lists:
            yield from dict.fromkeys(_lengths(batch, top=True))
        else:
            yield from dict.fromkeys(
                _size(a, self.dims[0]) for a in arrays_inside(batch) if a.ndim > self.dims[0]
            )

    def _expected(self, batch: Any) -> int:
        n = self.count(batch)
        if n is None:
            raise DoesNotFitError(f"a {type(batch).__name__} is not made of samples like this")
        return n

    def _fits(self, batch: Any, n: int) -> bool:
        try:
            return len(self._pieces(batch, n)) > 0
        except DoesNotFitError:
            return False

    def _pieces(self, batch: Any, n: int) -> list[Any]:
        found: list[Any] = []
        self._replaced(batch, n, lambda piece, dim: found.append(piece))
        return found

    def _shared(self, batch: Any, n: int) -> list[Any]:
        """What a batch has beside its samples, comparable."""
        shared: list[Any] = []
        self._replaced(batch, n, lambda piece, dim: shared.append(_kind(piece, dim)), shared.append)
        return shared

    def _replaced(
        self,
        batch: Any,
        n: int,
        function: Callable[[Any, int], Any],
        seen: Callable[[Any], None] = lambda thing: None,
    ) -> Any:
        """The batch with ``function(piece, dim)`` for all that runs over its n samples."""

        def replace(node: Any) -> Any:
            if isinstance(node, PackedSequence):
                _require(int(node.batch_sizes[0]) == n)
                return function(node, 0)
            if _is_nested(node):
                _require(node.size(0) == n)
                return function(node, 0)
            if isinstance(node, Tensor | np.ndarray) and node.ndim > 0:
                dim = next((d for d in self.dims if d < node.ndim and node.shape[d] == n), None)
                if dim is None and node.ndim == 1 and len(node) == n:
                    dim = 0
                _require(dim is not None)
                return function(node, dim or 0)
            if isinstance(node, (Tensor, np.ndarray, *CONSTANTS)):
                seen(node.tolist() if isinstance(node, Tensor | np.ndarray) else node)
                return node
            if _is_list(node) and (node is not batch or self.name == "rows"):
                if len(node) == n and (self.lists or not _holds_arrays(node)):
                    return function(node, 0)
                _require(not self.strict or self.lists or _holds_arrays(node))
            names = node if isinstance(node, Mapping) else getattr(node, "__dict__", ())
            seen((type(node), *names))
            if _is_container(node):
                return DESCEND
            _require(len(names) > 0 and not callable(node))
            copied = copy.copy(node)
            vars(copied).update({k: mapped(replace, item) for k, item in vars(node).items()})
            return copied

        return mapped(replace, batch)


class Positioned(NamedTuple):
    """A batch that knows which of all samples are its."""

    batch: Any
    place: Tensor  # (N,), of each sample in a pass over the data

    @classmethod
    def at(cls, start: int, batch: Any, device: torch.device) -> Positioned:
        n = next((n for r in READINGS if (n := r.count(batch)) is not None), None)
        if n is None:
            raise ValueError(
                f"a batch of the kind {type(batch).__name__} does not say how many samples it holds, so "
                "that there are no draws of their own for each; use batches of tensors that run over "
                "samples first"
            )
        return cls(batch, torch.arange(start, start + n, device=device))


COLUMNS = Reading("columns")
LISTS = Reading("lists", lists=True)
ROWS = Reading("rows", lists=True)
SECOND = Reading("second", dims=(1, 0))
LOOSE = Reading("loose", strict=False)

READINGS = (COLUMNS, LISTS, ROWS, SECOND, LOOSE)
"""In the order in which they are likely where several fit."""


def samples_in(batch: Any, telling: Any = None) -> float:
    """The number of samples of a batch, as far as its look tells.

    If not all of it agrees, the part that is ``telling`` does.
    """
    known = _is_container(batch) or isinstance(batch, Tensor | np.ndarray)
    for reading in (COLUMNS, LISTS) if known else ():
        if (n := reading.count(batch)) is not None:
            return float(n)
    part = batch if telling is None else telling
    if _is_list(part) and part and (telling is not None or all(map(_is_container, part))):
        return float(len(part))
    for array in arrays_in(part):
        if array.ndim > 0:
            return float(_size(array, 0))
    if hasattr(part, "__len__") and not isinstance(part, Tensor | np.ndarray):
        return float(len(part))
    raise ValueError(
        f"cannot tell how many samples a {type(batch).__name__} holds; "
        "pass average=Average(weight=...) with a function of the batch, or BATCHES or TOTAL"
    )


def _require(fits: bool) -> None:
    if not fits:
        raise DoesNotFitError


def _is_list(node: Any) -> bool:
    return isinstance(node, list | tuple) and not hasattr(node, "_fields")


def _is_container(node: Any) -> bool:
    record = dataclasses.is_dataclass(node) and not isinstance(node, type)
    return isinstance(node, list | tuple | Mapping) or record


def _holds_arrays(node: Any) -> bool:
    return any(a.ndim > 0 for a in arrays_in(node))


def _lengths(node: Any, *, top: bool = False) -> Iterator[int]:
    """How long the lists inside a batch are, outer ones first."""
    if _is_list(node) and not top:
        yield len(node)
    if isinstance(node, list | tuple | Mapping) and not isinstance(node, PackedSequence):
        for item in node.values() if isinstance(node, Mapping) else node:
            yield from _lengths(item)


def _is_nested(node: Any) -> bool:
    return isinstance(node, Tensor) and node.is_nested


def _size(array: Tensor | np.ndarray, dim: int) -> int:
    return array.size(0) if isinstance(array, Tensor) and array.is_nested else array.shape[dim]


def _nested(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(list(parts), layout=like.layout)


def _kind(piece: Any, dim: int) -> Any:
    """What two pieces must have in common to be put together."""
    if _is_nested(piece):
        return dim, piece.dtype, piece.layout
    if isinstance(piece, Tensor | np.ndarray):
        return dim, piece.dtype, *(s for d, s in enumerate(piece.shape) if d != dim)
    return type(piece)


def _cut(piece: Any, dim: int, rows: slice) -> Any:
    if isinstance(piece, PackedSequence):
        return pack_sequence(unpack_sequence(piece)[rows], enforce_sorted=False)
    if _is_nested(piece):
        return _nested(piece.unbind()[rows], piece)
    return piece[(slice(None),) * dim + (rows,)] if dim else piece[rows]


def _put_together(first: Any, second: Any, dim: int) -> Any:
    if _is_nested(first):
        return _nested([*first.unbind(), *second.unbind()], first)
    if isinstance(first, Tensor):
        return torch.cat([first, second], dim)
    if isinstance(first, np.ndarray):
        return np.concatenate([first, second], dim)
    if isinstance(first, PackedSequence):
        return pack_sequence(unpack_sequence(first) + unpack_sequence(second), enforce_sorted=False)
    return first + second
