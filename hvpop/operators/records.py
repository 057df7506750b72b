"""Records in a file, one behind the other: each with plain values and large tensors, none of them copied."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .._torch import content
from .space import Space

MAGIC = b"hvpop checkpoint 4\n"
_HEAD = struct.Struct(">QQ")  # bytes of the values, bytes of the tensors behind them
_DIGEST = 16  # bytes; a record's covers those of all before it
_PIECE = 1 << 24  # numbers or bytes at a time
_DTYPES = {str(t): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


class Held:
    """A file that can be read as it was when it was opened, whatever takes its name meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "rb")  # noqa: SIM115 (closed when nothing is to be read any more)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def now(self) -> os.stat_result:
        return os.fstat(self.file.fileno())


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read when it is wanted, into memory that is there already."""

    held: Held
    places: tuple[tuple[int, int], ...]  # (offset, rows)
    shape: tuple[int, ...]  # all rows
    dtype: torch.dtype
    device: torch.device  # where it was, on this machine

    def read(self, out: Tensor) -> Tensor:
        """``out``, contiguous and of this shape, filled."""
        if tuple(out.shape) != self.shape or out.dtype is not self.dtype:
            raise ValueError(
                f"expected {self.shape} {self.dtype}, got {tuple(out.shape)} {out.dtype}"
            )
        row = 0
        for offset, rows in self.places:
            self.held.file.seek(offset)
            for piece in out[row : row + rows].view(-1).split(_PIECE):
                self._fill(piece)
            row += rows
        return out

    def row(self, i: int, out: Tensor) -> None:
        """The ``i``-th row, in ``out``, contiguous."""
        for offset, rows in self.places:
            if i < rows:
                self.held.file.seek(offset + i * out.nbytes)
                return self._fill(out)
            i -= rows
        raise IndexError(f"{self.shape} has no row {i}")

    def _fill(self, piece: Tensor) -> None:
        host = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
        if self.held.file.readinto(content(host)) != host.nbytes:
            raise ValueError(f"{self.held.path} ends too early")
        if host is not piece:
            piece.copy_(host)

    def made(self) -> Tensor:
        """The tensor, in memory of its own."""
        return self.read(torch.empty(self.shape, dtype=self.dtype, device=self.device))


@dataclass(frozen=True)
class Parts:
    """Vectors ``(n, k)`` of which processes hold a part each, written whole, as rows ``(k, N)``."""

    V: Tensor
    space: Space

    @property
    def dtype(self) -> torch.dtype:
        return self.V.dtype

    @property
    def device(self) -> torch.device:
        return self.V.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.V.shape[1], self.space.order

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.V.element_size()

    def pieces(self) -> Iterator[Tensor]:
        """Whole vectors, one after the other, on all processes."""
        for i in range(self.V.shape[1]):
            yield self.space.whole(self.V[:, i : i + 1])[:, 0]


@dataclass(frozen=True)
class Dealt:
    """Whole vectors in a file that one process reads, and of which each keeps its part."""

    stored: Stored | None  # where this process reads
    rows: range
    space: Space

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.space.order

    def made(self) -> Tensor:
        """The parts held here, ``(n, k)``."""
        rows = iter(self.rows)

        def fill(v: Tensor) -> None:
            i = next(rows)
            if self.stored is not None:
                self.stored.row(i, v)
            self.space.given(v)

        return self.space.random(fill, len(self.rows))

    def read(self, out: Tensor) -> Tensor:
        """``out``, as many rows ``(k, n)``, filled one by one."""
        for i in self.rows:
            out[i] = Dealt(self.stored, range(i, i + 1), self.space).made()[:, 0]
        return out


def joined(parts: list[Stored]) -> Stored:
    """The rows of all parts, one behind the other."""
    places = tuple(place for part in parts for place in part.places)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return replace(parts[0], places=places, shape=shape)


@dataclass(frozen=True)
class Found:
    """A whole record: its values, and its tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, Stored]


def write(
    file: BinaryIO, before: bytes, values: dict[str, Any], tensors: Mapping[str, Tensor | Parts]
) -> bytes:
    """Write a record behind that with the digest ``before``; returns its own."""
    stream = pieces(tensors)
    try:
        return _written(file, before, values, tensors, stream)
    finally:
        deque(stream, maxlen=0)  # others wait until each piece has been asked for


def _written(
    file: BinaryIO,
    before: bytes,
    values: dict[str, Any],
    tensors: Mapping[str, Tensor | Parts],
    stream: Iterator[Tensor],
) -> bytes:
    kinds = [
        [name, str(t.dtype), list(t.shape), t.device.type == "cpu"] for name, t in tensors.items()
    ]
    buffer = io.BytesIO()
    torch.save({"values": values, "tensors": kinds}, buffer)
    hashed = hashlib.blake2b(before, digest_size=_DIGEST)

    def put(part: Any) -> None:
        hashed.update(part)
        file.write(part)

    put(_HEAD.pack(buffer.tell(), sum(t.nbytes for t in tensors.values())))
    put(buffer.getbuffer())
    for piece in stream:
        put(content(piece.cpu()))
    file.write(hashed.digest())
    return hashed.digest()


def pieces(tensors: Mapping[str, Tensor | Parts]) -> Iterator[Tensor]:
    """What is written of some tensors, in order; of `Parts` all processes have to ask for it."""
    for tensor in tensors.values():
        if isinstance(tensor, Parts):
            yield from tensor.pieces()
        else:
            yield from tensor.detach().reshape(-1).split(_PIECE)


def read(held: Held, device: torch.device) -> tuple[list[Found], int, bytes]:
    """The whole records of a file, where they end, and the digest of the last; none of another file.

    What a write that was cut short has left behind them is not looked at. Tensors that were not on the
    host go to ``device``.
    """
    found: list[Found] = []
    digest, file = b"", held.file
    if file.read(len(MAGIC)) != MAGIC:
        return found, 0, digest
    end, size = file.tell(), held.now().st_size
    while (after := _checked(file, size, digest)) is not None:
        file.seek(end)
        found.append(_record(held, device))
        end, digest = after
        file.seek(end)
    return found, end, digest


def _checked(file: BinaryIO, size: int, before: bytes) -> tuple[int, bytes] | None:
    """Where the record that begins here ends, and its digest; None where none is whole."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or file.tell() + sum(_HEAD.unpack(head)) + _DIGEST > size:
        return None
    hashed = hashlib.blake2b(before, digest_size=_DIGEST)
    hashed.update(head)
    for piece in _pieces(file, sum(_HEAD.unpack(head))):
        hashed.update(piece)
    whole = file.read(_DIGEST) == hashed.digest()
    return (file.tell(), hashed.digest()) if whole else None


def _record(held: Held, device: torch.device) -> Found:
    file = held.file
    length = _HEAD.unpack(file.read(_HEAD.size))[0]

    def place(storage: Any, location: str) -> Any:
        where = location if location == "cpu" else str(device)
        return torch.serialization.default_restore_location(storage, where)

    values = io.BytesIO(file.read(length))
    content = torch.load(values, map_location=place, weights_only=True)
    offset, tensors = file.tell(), {}
    for name, kind, shape, on_host in content["tensors"]:
        home = torch.device("cpu") if on_host else device
        stored = Stored(held, ((offset, shape[0]),), tuple(shape), _DTYPES[kind], home)
        tensors[name] = stored
        offset += math.prod(shape) * stored.dtype.itemsize
    return Found(content["values"], tensors)


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length:
        piece = file.read(min(length, _PIECE))
        length -= len(piece)
        yield piece
