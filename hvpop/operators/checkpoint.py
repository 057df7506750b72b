"""A file that a long computation can be continued from: written atomically, refused if not its own."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from . import expression, probes, replacing
from .base import LinearOperator
from .records import MAGIC, Dealt, Found, Held, Parts, Stored, joined, pieces, read, write
from .space import Space

T = TypeVar("T")

Place = str | os.PathLike[str]

_PAUSE = 10.0  # seconds between two saves at least, ...
_SHARE = 0.05  # ... and more where saving would take a larger share of the time than this


class Checkpoint:
    """The file ``path`` for a computation called ``task``, run with ``settings`` on ``A``.

    The operator is recognised by how it is put together (sums, scales, damping) and by the product of
    each of its parts with a seeded vector of signs, so that the same matrix is accepted from a new
    process and another point, data set, loss or damping is not. It costs about one product, or two of
    a composite of a user's own, which are not counted in the budget; so are ``also`` others (a
    preconditioner). What the file holds carries a checksum.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        task: str,
        A: LinearOperator,
        settings: Mapping[str, Any],
        vectors: Collection[str] = (),
        also: Sequence[LinearOperator] = (),
    ) -> None:
        self.path, self._task = Path(path), task
        self._space, self._vectors = A.space, frozenset(vectors)
        self._target = Path(os.path.realpath(path))  # a link stays one
        self._by_leader(lambda: self._refuse_place(task))
        structure, products = expression.identified(A)
        self.identity = {
            "task": task,
            "shape": list(A.shape),
            "dtype": str(A.torch_dtype),
            "device": A.device.type,
            "operator": structure,
            "settings": dict(settings),
        }
        if also:
            others = [expression.identified(one) for one in also]
            self.identity["further operators"] = [structure for structure, _ in others]
            products = sum((found for _, found in others), products)
        self._products = products if self._space.leads else []
        self._place = replacing.Folder(self._target.parent, self._target.name)
        self._written: _Written | None = None
        self._operator, self._device = A, A.device
        self._uses = expression.uses(A)
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self._warned = False

    def load(self) -> dict[str, Any] | None:
        """The state saved last, each tensor where it was; None if there is no file yet.

        Its rows, if it has any, come as `Stored` or `Dealt`, to be read into their place.
        """
        stored: dict[str, Stored] = {}
        found = self._by_leader(lambda: self._found(stored))
        if found is None:
            return None
        values, counts = found
        self._uses = values["uses"]
        expression.used(self._operator, self._uses)
        state = {**values["state"]}
        for name, count in counts.items():
            one, upright = stored.get(name), name not in values["transposed"]
            wanted = name in values["state"]  # now, and not into memory that is there already
            if self._space.shared:
                dealt = Dealt(one, range(count), self._space)
                state[name] = (dealt.made()[:, 0] if upright else dealt.made()) if wanted else dealt
            elif one is not None:
                state[name] = (one.made() if upright else one.made().T) if wanted else one
        return state

    def _by_leader(self, work: Callable[[], T]) -> T:
        """What a piece of work gives on the process that leads, or raises there, on all."""
        found: Any = None
        error: Exception | None = None
        if self._space.leads:
            try:
                found = work()
            except Exception as problem:
                error = problem
        found, error = self._space.told((found, error))
        if error is not None:
            raise error
        result: T = found
        return result

    def _found(self, stored: dict[str, Stored]) -> tuple[dict[str, Any], dict[str, int]] | None:
        """The values saved last, and how many rows each tensor has that is ``stored``; None without a file."""
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
            products = [one.made() for one in _products(found[0])]
            values = found[-1].values
            stored |= self._stored(found)
            self._written = _Written.now(held, end, digest, found)
        except Exception as error:  # of another version, or made up
            raise self.foreign() from error
        self._refuse_operator(products)
        return values, {name: one.shape[0] for name, one in stored.items()}

    def _stored(self, found: list[Found]) -> dict[str, Stored]:
        values, tensors = found[-1].values, found[-1].tensors
        stored = {name: tensors[name] for name in tensors if name in values["state"]}
        if values["rows"] is not None:
            name, _, _, count = values["rows"]
            stored[name] = joined([record.tensors[name] for record in found])
            if stored[name].shape[0] != count:
                raise ValueError(f"expected {count} rows, found {stored[name].shape}")
        return stored

    def foreign(self) -> ValueError:
        """What is said of a file that `save` has not written."""
        return ValueError(
            f"{self.path} is not a checkpoint of hvpop; give another path, or delete the file"
        )

    def save(self, state: Mapping[str, Any], rows: Rows | None = None) -> None:
        """Save ``state``; what was saved before can be read until that is done.

        Where only ``rows`` have been added to since the last save, they are appended with the rest of the
        state; else the file is replaced. Nothing is copied. What cannot be written is said once: a disk
        that is full must not cost the result.
        """
        start = time.monotonic()
        if not self._space.leads:
            return self._take_part(state, rows)
        self._begun = False
        try:
            if not self._append(state, rows):
                self._replace(state, rows)
        except (OSError, RuntimeError) as error:  # torch's writer turns one into the other
            if self._space.shared and not isinstance(error, OSError):
                raise  # processes are gone
            if not self._begun:
                self._space.told()
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

    def _take_part(self, state: Mapping[str, Any], rows: Rows | None) -> None:
        """Give what is held here to the process that writes."""
        first = self._space.told()
        if first is not None:
            deque(pieces(self._content(state, rows, first)[1]), maxlen=0)

    def _wanted(
        self, state: Mapping[str, Any], rows: Rows | None, first: int
    ) -> tuple[dict[str, Any], dict[str, Tensor | Parts]]:
        """`_content`, of which all processes are told that it is to be written now."""
        self._begun = True
        return self._content(state, rows, self._space.told(first))

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
            values, tensors = self._wanted(state, rows, last.rows.count)
            try:
                digest = write(file, last.digest, values, tensors)
                replacing.flush(file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), last.known.st_size)
                raise
            self._written = _Written(os.fstat(file.fileno()), digest, rows.mark())
        return True

    def _replace(self, state: Mapping[str, Any], rows: Rows | None) -> None:
        """Write a file anew, and give it the name."""

        def fill(file: BinaryIO) -> tuple[os.stat_result, bytes]:
            values, tensors = self._wanted(state, rows, 0)
            products = {f"{_PRODUCT}{i}": v for i, v in enumerate(self._products)}
            file.write(MAGIC)
            values = {"identity": self.identity, **values}
            digest = write(file, b"", values, {**tensors, **products})
            file.flush()
            return os.fstat(file.fileno()), digest

        known, digest = self._place.replace(self._target, fill)
        self._written = _Written(known, digest, None if rows is None else rows.mark())

    def stepped(self) -> None:
        """A step is done: how much the operator was used belongs to the state after it.

        Of a step that fails, the next one after a restart repeats all products.
        """
        self._uses = expression.uses(self._operator)

    def due_after_step(self) -> bool:
        """`stepped`, and whether it is time to save."""
        self.stepped()
        return self.due()

    def due(self) -> bool:
        """Whether it is time to save again, for all processes alike."""
        due = time.monotonic() - self._saved_at > max(_PAUSE, self._cost / _SHARE)
        said = torch.tensor([float(due)], device=self._device)
        return bool(self._space.given(said)) if self._space.shared else due

    def _content(
        self, state: Mapping[str, Any], rows: Rows | None, first: int
    ) -> tuple[dict[str, Any], dict[str, Tensor | Parts]]:
        """The plain values of a record, and its tensors: large ones, vectors in parts, and the rows from ``first`` on."""
        tensors: dict[str, Tensor | Parts] = {}
        small, transposed, in_parts = dict(state), [], self._space.shared
        for name, part in state.items():
            if not isinstance(part, Tensor):
                continue
            if in_parts and name in self._vectors:
                tensors[name], small[name] = Parts(part.reshape(len(part), -1), self._space), None
                transposed += [name] if part.ndim == 2 else []
            elif not in_parts and part.numel() >= _LARGE and part.dtype.is_floating_point:
                if part.ndim == 2 and part.T.is_contiguous() and not part.is_contiguous():
                    transposed.append(name)
                tensors[name] = part.T if name in transposed else part.contiguous()
                small[name] = None
            else:
                small[name] = part.clone()  # torch saves all that is behind a tensor
        place = None
        if rows is not None:
            place = [rows.name, rows.generation, first, rows.values.shape[0]]
            new = rows.values[first:]
            tensors[rows.name] = Parts(new.T, self._space) if in_parts else new
        values = {"state": small, "rows": place, "transposed": transposed, "uses": self._uses}
        return values, tensors

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
        for key in {**self.identity, **identity}:
            if identity.get(key) != (mine := self.identity.get(key)):
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
        return os.path.samestat(self.known, now) and self.known.st_size == now.st_size

    @staticmethod
    def now(held: Held, end: int, digest: bytes, found: list[Found]) -> _Written | None:
        """None where something torn is at the end: that file is to be replaced."""
        known, rows = held.now(), found[-1].values["rows"]
        mark = None if rows is None else Mark(rows[0], rows[1], rows[3])
        return _Written(known, digest, mark) if known.st_size == end else None


_PRODUCT = "product "
_LARGE = 1 << 12  # numbers, from which on a tensor is written as it is


def _products(first: Found) -> list[Stored]:
    return [stored for name, stored in first.tensors.items() if name.startswith(_PRODUCT)]


def digest(V: Tensor | None, space: Space | None = None) -> str | None:
    """A short text that identifies the vectors given to a computation."""
    if V is None:
        return None
    columns = V.detach().reshape(V.shape[0], -1)
    if space is not None and space.shared:  # the same for any number of processes
        whole = [space.whole(columns[:, i : i + 1]) for i in range(columns.shape[1])]
        return " ".join(filter(None, map(digest, whole)))
    own = Space.of(columns)
    numbers = own.inner(probes.gaussian(own, 1, "digest"), columns)[0].tolist()
    return " ".join(f"{value:.6e}" for value in numbers)
