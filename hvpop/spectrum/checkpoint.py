"""A file that a long computation can be continued from: written atomically, refused if not its own."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, Space
from . import expression, probes

_FORMAT = 3
_PAUSE = 10.0  # seconds between two saves at least, ...
_SHARE = 0.05  # ... and more where saving would take a larger share of the time than this


class Checkpoint:
    """The file ``path`` for a computation called ``task``, run with ``settings`` on ``A``.

    The operator is recognised by how it is put together (sums, scales, damping) and by the product of
    each of its parts with a seeded vector of signs, so that the same matrix is accepted from a new
    process and another point, data set, loss or damping is not. It costs about one product, which is
    not counted in the budget. What the file holds carries a checksum.
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
        self.identity = {
            "format": _FORMAT,
            "task": task,
            "shape": list(A.shape),
            "dtype": str(A.torch_dtype),
            "device": A.device.type,
            "operator": expression.structure(A),
            "settings": dict(settings),
        }
        self._products = expression.products(A)
        self._device = A.device
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self._warned = False

    def load(self) -> dict[str, Any] | None:
        """The saved state, each tensor where it was; None if there is no file yet."""
        try:
            file = torch.load(self._target, map_location=self._place, weights_only=True)
            identity = dict(file["identity"])
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:  # torch seeks beyond the ends of a file that was cut
                raise
            raise self.foreign() from error
        except Exception as error:  # whatever torch makes of a file of another kind
            raise self.foreign() from error
        self._refuse_other(identity)
        if file.get("checksum") != _checksum({**file, "checksum": None}):
            raise self.foreign()
        self._refuse_operator(file["products"])
        return dict(file["state"])

    def foreign(self) -> ValueError:
        """What is said of a file that `save` has not written."""
        return ValueError(
            f"{self.path} is not a checkpoint of hvpop.spectrum; give another path, "
            "or delete the file"
        )

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file by ``state``; at any moment the file is either the old or the new one.

        What cannot be written is said once: a disk that is full must not cost the result.
        """
        start = time.monotonic()
        content = {"identity": self.identity, "products": self._products, "state": _alone(state)}
        try:
            self._write({**content, "checksum": _checksum({**content, "checksum": None})})
        except (OSError, RuntimeError) as error:  # torch's writer turns one into the other
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

    def _write(self, content: Mapping[str, Any]) -> None:
        folder = self._target.parent
        descriptor, name = tempfile.mkstemp(suffix=".tmp", prefix=".hvpop-", dir=folder)
        temporary = Path(name)
        try:
            with open(descriptor, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(folder)

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved_at > max(_PAUSE, self._cost / _SHARE)

    def _place(self, storage: Any, location: str) -> Any:
        where = location if location == "cpu" else str(self._device)
        return torch.serialization.default_restore_location(storage, where)

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


def _alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with no more memory behind a tensor than it shows: torch saves all that is behind one."""

    def own(part: Any) -> Any:
        if not isinstance(part, Tensor) or part.untyped_storage().nbytes() == part.nbytes:
            return part
        if part.device.type == "cpu" and part.is_contiguous():
            return torch.from_numpy(part.detach().numpy())  # the same memory, its end seen
        return part.clone()

    return {key: own(part) for key, part in state.items()}


def _checksum(content: Any) -> str:
    """Of nested mappings, lists, tensors and plain values: their types, shapes and bits."""
    hashed = hashlib.blake2b(digest_size=16)

    def feed(part: Any) -> None:
        if isinstance(part, Tensor):
            hashed.update(repr((part.dtype, tuple(part.shape))).encode())
            bits = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hashed.update(bits.numpy().data)
        elif isinstance(part, Mapping):
            for key in sorted(part, key=repr):
                hashed.update(repr(key).encode())
                feed(part[key])
        elif isinstance(part, list | tuple):
            hashed.update(repr(len(part)).encode())
            for item in part:
                feed(item)
        else:
            hashed.update(repr(part).encode())

    feed(content)
    return hashed.hexdigest()


def digest(V: Tensor | None) -> str | None:
    """A short text that identifies the vectors given to a computation."""
    if V is None:
        return None
    columns = V.detach().reshape(V.shape[0], -1)
    space = Space.of(columns)
    numbers = space.inner(probes.gaussian(space, 1, "digest"), columns)[0].tolist()
    return " ".join(f"{value:.6e}" for value in numbers)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # the new name itself must reach the disk
        with contextlib.suppress(OSError):  # not every file system can
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
