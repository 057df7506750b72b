"""Products written down: what makes any deterministic solver resumable."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .._torch import content
from ..operators import LinearOperator
from ..operators.algebra import Composite
from ..operators.records import MAGIC, Held, read, write
from ..operators.replacing import Folder


class Journal(Composite):
    """An operator that remembers its products in files, and does not make them twice.

    SciPy's solvers keep their state to themselves, but do the same again when they are started again:
    a run that was killed is repeated from the files up to the product where it ended, and goes on.
    The same bits come out as without the interruption.

    Parameters
    ----------
    A : LinearOperator
        Linearized first: what is written down is of the matrix as it is now.
    path : path
        A directory, made if missing. It belongs to one matrix and one solver: of another matrix it is
        refused, by a product with a vector of its own that is made once at each start.

    Raises
    ------
    ValueError
        If the files are of another matrix, or do not say of which.
    FloatingPointError
        If a product is not finite.

    Notes
    -----
    A product costs a hash of its vector and a file of its own size, ``8 n k`` bytes in float64; none
    is ever removed. Files are written under another name, flushed and renamed, so that none is ever
    half there; each carries a checksum, and a damaged one is made again. Where one cannot be written the
    run goes on, with a warning. Random start vectors have to be the same at each start: ``eigsh(..., v0=...)``. With
    several processes: ``H.drive(lambda A: eigsh(Journal(A, path), v0=v0))``.

    Examples
    --------
    >>> import tempfile, numpy as np, torch
    >>> from scipy.sparse.linalg import cg
    >>> from hvpop import Diagonal
    >>> from hvpop.distributed import Journal
    >>> A = Diagonal(torch.arange(1.0, 9.0, dtype=torch.float64))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     x, _ = cg(Journal(A, path), np.ones(8))
    ...     again = Journal(A, path)
    ...     y, _ = cg(again, np.ones(8))
    >>> bool((x == y).all()), again.made, again.repeated
    (True, 0, 8)
    """

    def __init__(self, A: LinearOperator, path: str | os.PathLike[str]) -> None:
        if not isinstance(A, LinearOperator):
            raise TypeError(f"Journal expects an operator of hvpop, got {type(A).__name__}")
        made: LinearOperator = A.linearize()
        super().__init__((made,), A.shape, symmetric=A.symmetric)
        self._made = self._repeated = 0
        self._path, self._warned = Path(path), False
        if self._path.exists() and not self._path.is_dir():
            raise NotADirectoryError(
                f"Journal expects path to be a directory, got the file {self._path}; give it one of its own"
            )
        self._path.mkdir(parents=True, exist_ok=True)
        self._place = Folder(self._path, "journal")
        self._recognize()

    @property
    def made(self) -> int:
        """Products that were made."""
        return self._made

    @property
    def repeated(self) -> int:
        """Products that were taken from the files."""
        return self._repeated

    def _recognize(self) -> None:
        """Refuse a directory that was written for another matrix."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[1], 1, generator=generator, dtype=self.space.dtype)
        now: Tensor = (self.parts[0] @ v.to(self.device)).cpu()
        if not now.isfinite().all():
            raise FloatingPointError(
                f"Journal({self.parts[0]!r}): a product is not finite; look for non-finite entries in the "
                "model, the data or the damping"
            )
        self._matrix = hashlib.blake2b(now.numpy().data, digest_size=16).digest()
        file = self._path / "matrix.pt"
        then = _read(file)
        if then is None and file.exists():
            raise ValueError(
                f"Journal: {file} is damaged, or was not written by a Journal, so that nobody knows which "
                f"matrix the products in {self._path} are of; remove that directory, or give another one"
            )
        if then is None:
            self._write(file, now)
        elif then.dtype != now.dtype or not torch.equal(then, now):
            raise ValueError(
                f"Journal({self.parts[0]!r}): the products in {self._path} are of another matrix; pass a "
                "directory of its own for each matrix, or remove this one"
            )

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return self._remembered(V, self.parts[0], "")

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self._remembered(U, self.parts[0].T, "transposed ")

    def _remembered(self, V: Tensor, A: LinearOperator, kind: str) -> Tensor:
        bits = V.detach().cpu().contiguous()
        said = f"{kind}{tuple(bits.shape)}{bits.dtype}".encode()
        key = hashlib.blake2b(said, digest_size=16)
        key.update(self._matrix)  # files of another one are not found, whatever became of matrix.pt
        key.update(content(bits))
        file = self._path / f"{key.hexdigest()}.pt"
        found = _read(file)
        if found is not None and tuple(found.shape) == (A.shape[0], V.shape[1]):
            self._repeated += V.shape[1]
            return found.to(V.device)
        Y: Tensor = A @ V
        self._write(file, Y.cpu())
        self._made += V.shape[1]
        return Y

    def _write(self, file: Path, tensor: Tensor) -> None:
        """All of a file, or nothing of it; a disk that is full must not cost the run."""
        try:
            self._place.replace(
                file, lambda stream: stream.write(MAGIC) and write(stream, b"", {}, {"Y": tensor})
            )
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"Journal goes on, but {file} cannot be written ({type(error).__name__}: {error}): "
                    "from here on products are lost with the process; make room, or make the directory "
                    "writable",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def report(self) -> str:
        """How many products were made, and how many taken from the files; and what the operator reports."""
        inner = str(super().report())
        own = f"journal {self._path}: {self.made} products made, {self.repeated} repeated"
        return "\n".join(filter(None, (own, inner)))


def _read(file: Path) -> Tensor | None:
    """What was written; None if there is nothing, or something damaged, which is made again."""
    try:
        found = read(Held(file), torch.device("cpu"))[0]
        return found[-1].tensors["Y"].made() if found else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RuntimeError):  # whole, and of something else
        return None
