"""A file that a long computation can be continued from: written atomically, refused if not its own."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..operators import LinearOperator, Space
from . import expression, probes
from .records import MAGIC, Found, Held, Stored, joined, read, write
from .replacing import Place, flush

_PAUSE = 10.0  # seconds between two saves at least, ...
_SHARE = 0.05  # ... and more where saving would take a larger share of the time than this


class Checkpoint:
    """The file ``path`` for a computation called ``task``, run with ``settings`` on ``A``.

    The operator is recognised by how it is put together (sums, scales, damping) and by the product of
    each of its parts with a seeded vector of signs, so that the same matrix is accepted from a new
    process and another point, data set, loss or damping is not. It costs about one product, or two of
    a composite of a user's own, which are not counted in the budget. What the file holds carries a
    checksum.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        task: str,
        A: LinearOperator,
        settings: Mapping[str, Any],
    ) -> None:
        self.path, self._task = Path(path), task
        self._target = Path(os.path.realpath(path))  # a link stays one
        self._refuse_place(task)
        structure, self._products = expression.identified(A)
        self.identity = {
            "task": task,
            "shape": list(A.shape),
            "dtype": str(A.torch_dtype),
            "device": A.device.type,
            "operator": structure,
            "settings": dict(settings),
        }
        self._place = Place(self._target.parent, self._target.name)
        self._written: _Written | None = None
        self._device = A.device
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self._warned = False

    def load(self) -> dict[str, Any] | None:
        """The state saved last, each tensor where it was; None if there is no file yet.

        Its rows, if it has any, come as `Stored`, to be read into their place.
        """
        self._place.remove_stale()
        try:
            held = Held(self._target)
            found, end, digest = read(held, self._device)
            identity = dict(found[0].values["identity"])
        except FileNotFoundError:
            return None
        except (IsADirectoryError, PermissionError):
            raise
        except Exception as error:  # whatever comes of a file of another kind
            raise self.foreign() from error
        self._refuse_other(identity)
        try:
            products = [stored.made() for stored in _products(found[0])]
            state = self._state(found)
            self._written = _Written.now(held, end, digest, found)
        except Exception as error:  # of another version, or made up
            raise self.foreign() from error
        self._refuse_operator(products)
        return state

    def _state(self, found: list[Found]) -> dict[str, Any]:
        values, tensors = found[-1].values, dict(found[-1].tensors)
        state = {**values["state"]}
        if values["rows"] is not None:
            name, _, _, count = values["rows"]
            state[name] = joined([record.tensors.pop(name) for record in found])
            tensors.pop(name)
            if state[name].shape[0] != count:
                raise ValueError(f"expected {count} rows, found {state[name].shape}")
        for name, stored in tensors.items():
            if name in values["state"]:
                made = stored.made()
                state[name] = made.T if name in values["transposed"] else made
        return state

    def foreign(self) -> ValueError:
        """What is said of a file that `save` has not written."""
        return ValueError(
            f"{self.path} is not a checkpoint of hvpop.spectrum; give another path, "
            "or delete the file"
        )

    def save(self, state: Mapping[str, Any], rows: Rows | None = None) -> None:
        """Save ``state``; what was saved before can be read until that is done.

        Where only ``rows`` have been added to since the last save, they are appended with the rest of the
        state; else the file is replaced. Nothing is copied. What cannot be written is said once: a disk
        that is full must not cost the result.
        """
        start = time.monotonic()
        try:
            if not self._append(state, rows):
                self._replace(state, rows)
        except (OSError, RuntimeError) as error:  # torch's writer turns one into the other
            self._written = None
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._task} goes on, but its checkpoint {self.path} cannot be written "
                    f"({type(error).__name__}: {error}); make room, or make the folder writable",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start

    def _append(self, state: Mapping[str, Any], rows: Rows | None) -> bool:
        """Add a record to the file that was written last, if it is still that, and goes on from there."""
        last = self._written
        if last is None or rows is None or last.rows is None or not last.rows.continued_by(rows):
            return False
        try:
            descriptor = os.open(
                self._target, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            )
        except OSError:
            return False
        with open(descriptor, "ab") as file:
            if not last.same(os.fstat(file.fileno())):
                return False
            values, tensors = _content(state, rows, last.rows.count)
            try:
                digest = write(file, last.digest, values, tensors)
                flush(file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), last.known.st_size)
                raise
            self._written = _Written(os.fstat(file.fileno()), digest, rows.mark())
        return True

    def _replace(self, state: Mapping[str, Any], rows: Rows | None) -> None:
        """Write a file anew, and give it the name."""

        def fill(file: BinaryIO) -> tuple[os.stat_result, bytes]:
            values, tensors = _content(state, rows, 0)
            products = {f"{_PRODUCT}{i}": v for i, v in enumerate(self._products)}
            file.write(MAGIC)
            values = {"identity": self.identity, **values}
            digest = write(file, b"", values, {**tensors, **products})
            file.flush()
            return os.fstat(file.fileno()), digest

        known, digest = self._place.replace(self._target, fill)
        self._written = _Written(known, digest, None if rows is None else rows.mark())

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved_at > max(_PAUSE, self._cost / _SHARE)

    def _refuse_place(self, task: str) -> None:
        """Refuse a path where no file can be, before there is work that would be lost."""
        if self.path.is_dir():
            raise IsADirectoryError(
                f"{task} expects checkpoint to be the path of a file, got the folder {self.path}; "
                f"give a path in it, such as {self.path / 'state.pt'}"
            )
        if not self._target.parent.is_dir():
            raise FileNotFoundError(
                f"{task} expects checkpoint to be a path in a folder that exists, got {self.path}; "
                f"make the folder {self._target.parent}, or give another path"
            )

    def _refuse_other(self, identity: Mapping[str, Any]) -> None:
        for key, mine in self.identity.items():
            if identity.get(key) != mine:
                raise ValueError(
                    f"checkpoint {self.path} belongs to another computation: its {key} is "
                    f"{identity.get(key)!r}, here it is {mine!r}; delete it or choose another path"
                )

    def _refuse_operator(self, products: list[Tensor]) -> None:
        differences = map(expression.difference, products, self._products)
        if (largest := max(differences, default=0.0)) > 0:
            raise ValueError(
                f"checkpoint {self.path} belongs to another operator (another point, data set, loss "
                f"or damping): their products with the same vector differ by {largest:.1e}; "
                "delete it or choose another path"
            )


@dataclass(frozen=True)
class Mark:
    """Which rows are in a file."""

    name: str
    generation: int
    count: int

    def continued_by(self, rows: Rows) -> bool:
        same = self.name == rows.name and self.generation == rows.generation
        return same and self.count <= rows.values.shape[0]


@dataclass(frozen=True)
class Rows:
    """A part of a state that grows by rows; those that are there change with the generation only."""

    name: str
    values: Tensor  # (count, n)
    generation: int

    def mark(self) -> Mark:
        return Mark(self.name, self.generation, self.values.shape[0])


@dataclass(frozen=True)
class _Written:
    """The file as this process has written or read it last."""

    known: os.stat_result
    digest: bytes
    rows: Mark | None

    def same(self, now: os.stat_result) -> bool:
        mine, theirs = self.known, now
        return (mine.st_ino, mine.st_dev, mine.st_size) == (
            theirs.st_ino,
            theirs.st_dev,
            theirs.st_size,
        )

    @staticmethod
    def now(held: Held, end: int, digest: bytes, found: list[Found]) -> _Written | None:
        """None where something torn is at the end: that file is to be replaced."""
        known, rows = held.now(), found[-1].values["rows"]
        mark = None if rows is None else Mark(rows[0], rows[1], rows[3])
        return _Written(known, digest, mark) if known.st_size == end else None


_PRODUCT = "product "
_LARGE = 1 << 12  # numbers, from which on a tensor is written as it is


def _content(
    state: Mapping[str, Any], rows: Rows | None, first: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain values of a record, and its tensors: large ones, and the rows from ``first`` on."""
    tensors, small, transposed = {}, dict(state), []
    for name, part in state.items():
        if isinstance(part, Tensor) and part.numel() >= _LARGE and part.dtype.is_floating_point:
            if part.ndim == 2 and part.T.is_contiguous() and not part.is_contiguous():
                transposed.append(name)
            tensors[name] = part.T if name in transposed else part.contiguous()
            small[name] = None
        elif isinstance(part, Tensor):
            small[name] = part.clone()  # torch saves all that is behind a tensor
    place = None
    if rows is not None:
        place = [rows.name, rows.generation, first, rows.values.shape[0]]
        tensors[rows.name] = rows.values[first:]
    return {"state": small, "rows": place, "transposed": transposed}, tensors


def _products(first: Found) -> list[Stored]:
    return [stored for name, stored in first.tensors.items() if name.startswith(_PRODUCT)]


def digest(V: Tensor | None) -> str | None:
    """A short text that identifies the vectors given to a computation."""
    if V is None:
        return None
    columns = V.detach().reshape(V.shape[0], -1)
    space = Space.of(columns)
    numbers = space.inner(probes.gaussian(space, 1, "digest"), columns)[0].tolist()
    return " ".join(f"{value:.6e}" for value in numbers)
