"""The rows that a batch has in a rectangular matrix: of outputs, or of gradients of a loss's terms."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..marker import AT_MARKS, Cutting
from ..strategies.parted import Parted, Tensors


class Rows:
    """The rows ``r_i' J`` of vectors ``r_i`` in the outputs of a batch.

    Parameters
    ----------
    faces
        How each output is read as rows ``(count, d)``.
    vectors
        ``r``, read so.
    weights
        What each row counts in the batch, ``(count,)``: those of a mean add up to 1.
    """

    def __init__(self, faces: list[Face], vectors: Tensors, weights: Tensor) -> None:
        self._faces, self.vectors, self.weights = faces, vectors, weights
        self.count = weights.numel()

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor:
        """The products ``(count,)``, or ``(k, count)``, of tangents of the outputs."""
        lead = () if k is None else (k,)
        parts = zip(self._faces, self.vectors, tangents, strict=True)
        found = [(face.rows(t, lead) * r).sum(-1) for face, r, t in parts]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def spread(self, u: Tensor, k: int | None = None) -> Tensors:
        """The cotangents of the outputs in which the rows add up by ``u``."""
        lead = () if k is None else (k,)
        parts = zip(self._faces, self.vectors, strict=True)
        return [face.entries(u[..., None] * r, lead) for face, r in parts]


@dataclass(frozen=True)
class Face:
    """How the entries of an output are read as rows."""

    shape: torch.Size
    count: int
    dim: (
        int | None
    )  # that of a row's entries, if it is one of the output's and not all the last ones

    def rows(self, t: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
        """``(*lead, count, d)`` of ``(*lead, *shape)``."""
        if self.dim is not None:
            t = t.movedim(self.dim + len(lead), -1)
        return table(t, *lead, self.count)

    def entries(self, rows: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
        """The inverse of `rows`."""
        if self.dim is None:
            return rows.reshape((*lead, *self.shape))
        rest = [n for d, n in enumerate(self.shape) if d != self.dim]
        rows = rows.reshape(*lead, *rest, self.shape[self.dim])
        return rows.movedim(-1, self.dim + len(lead))


def table(t: Tensor, *shape: int) -> Tensor:
    """In a shape with all that is left last, be there no entries at all."""
    return t.reshape(*shape, t.numel() // max(prod(shape), 1))


class Outputs:
    """Makes rows of a batch: every entry of its outputs is one, in the order of the samples."""

    cutting = AT_MARKS

    def __call__(self, parted: Parted) -> OutputRows:
        return OutputRows(parted.outputs)

    def count(self, parted: Parted) -> int:
        """How many rows there are."""
        return sum(z.numel() for z in parted.outputs)


class OutputRows:
    """The entries of outputs: of a single one as they are, of several by sample."""

    def __init__(self, outputs: Tensors) -> None:
        self._shapes = [z.shape for z in outputs]
        samples = {s[0] if s else None for s in self._shapes}
        if len(outputs) > 1 and (len(samples) > 1 or None in samples):
            raise ValueError(
                "the model has several outputs, whose first dimensions are not the same, so that there "
                f"is no order of their entries by sample: shapes {[tuple(s) for s in self._shapes]}"
            )
        self._samples = samples.pop() or 1
        self.count = sum(prod(s) for s in self._shapes)

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor:
        lead = () if k is None else (k,)
        return torch.cat([t.reshape(*lead, self._samples, -1) for t in tangents], -1).reshape(
            *lead, -1
        )

    def spread(self, u: Tensor, k: int | None = None) -> Tensors:
        lead = () if k is None else (k,)
        sizes = [prod(s) // self._samples for s in self._shapes]
        pieces = u.reshape(*lead, self._samples, -1).split(sizes, -1)
        return [p.reshape(*lead, *s) for p, s in zip(pieces, self._shapes, strict=True)]


class Weighed(Protocol):
    """Rows that count something each."""

    count: int
    weights: Tensor

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor: ...

    def spread(self, u: Tensor, k: int | None = None) -> Tensors: ...


class Maker(Protocol):
    """Makes rows of a parted function."""

    cutting: Cutting

    def prove(self, parted: Parted) -> None: ...

    def __call__(self, parted: Parted) -> Weighed: ...


class SecondMoment:
    """``B = sum_i w_i r_i r_i'``, for `ThroughOutputs`."""

    def __init__(self, maker: Maker) -> None:
        self._maker, self.cutting = maker, maker.cutting

    def prove(self, parted: Parted) -> None:
        self._maker.prove(parted)

    def __call__(self, parted: Parted) -> Moment:
        return Moment(self._maker(parted))


class Moment:
    """``B`` of one parted function, for as long as its map lives."""

    def __init__(self, rows: Weighed) -> None:
        self.rows = rows

    def __call__(self, s: Tensors, k: int | None) -> Tensors:
        return self.rows.spread(self.rows.weights * self.rows.gather(s, k), k)
