"""A file that a long computation can be continued from: written atomically, refused if not its own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.crossing import working_dtype
from . import probes

_FORMAT = 1
_PAUSE = 10.0  # seconds between two saves at least, ...
_SHARE = 0.05  # ... and more where saving would take a larger share of the time than this


class Checkpoint:
    """The file ``path`` for a computation called ``task``, run with ``settings`` on ``A``.

    The operator is recognised by its product with a seeded vector of signs, so that the same matrix
    is accepted from a new process and another point, data set or loss is not. It costs one product,
    which is not counted in the budget.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        task: str,
        A: LinearOperator,
        settings: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        self._refuse_place(task)
        self.identity = {
            "format": _FORMAT,
            "task": task,
            "shape": list(A.shape),
            "dtype": str(A.torch_dtype),
            "device": A.device.type,
            "settings": dict(settings),
        }
        self._dtype = working_dtype(A.torch_dtype)
        probe = probes.signs(A.shape[1], 1, self._dtype, A.device, "checkpoint")
        self._product = (A @ probe)[:, 0].cpu()
        self._device = A.device
        self._saved_at = time.monotonic()
        self._cost = 0.0

    def load(self) -> dict[str, Any] | None:
        """The saved state, each tensor where it was; None if there is no file yet."""
        if not self.path.exists():
            return None
        try:
            file = torch.load(self.path, map_location=self._place, weights_only=True)
            identity, product, state = file["identity"], file["product"], file["state"]
        except OSError:
            raise
        except Exception as error:  # whatever torch makes of a file of another kind
            raise ValueError(
                f"{self.path} is not a checkpoint of hvpop.spectrum; give another path, "
                "or delete the file"
            ) from error
        self._refuse_other(identity, product)
        return dict(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file by ``state``; at any moment the file is either the old or the new one."""
        start = time.monotonic()
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        content = {"identity": self.identity, "product": self._product, "state": dict(state)}
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.path.parent)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start

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
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"{task} expects checkpoint to be a path in a folder that exists, got {self.path}; "
                f"make the folder {self.path.parent}, or give another path"
            )

    def _refuse_other(self, identity: Mapping[str, Any], product: Tensor) -> None:
        for key, mine in self.identity.items():
            if identity.get(key) != mine:
                raise ValueError(
                    f"checkpoint {self.path} belongs to another computation: its {key} is "
                    f"{identity.get(key)!r}, here it is {mine!r}; delete it or choose another path"
                )
        # Rounding may differ between machines and thread counts, another point differs by far more.
        difference = (product - self._product).norm() / self._product.norm().clamp_min(1e-300)
        if not difference <= 1e3 * torch.finfo(self._dtype).eps:
            raise ValueError(
                f"checkpoint {self.path} belongs to another operator (another point, data set or "
                f"loss): their products with the same vector differ by {difference.item():.1e}; "
                "delete it or choose another path"
            )


def digest(V: Tensor | None) -> str | None:
    """A short text that identifies the vectors given to a computation."""
    if V is None:
        return None
    columns = V.detach().reshape(V.shape[0], -1)
    probe = probes.gaussian(V.shape[0], 1, V.dtype, V.device, "digest")
    return " ".join(f"{value:.6e}" for value in (probe.T @ columns)[0].tolist())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # the new name itself must reach the disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
