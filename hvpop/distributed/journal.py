"""Products written down: what makes any deterministic solver resumable."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.algebra import Composite


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
        If the files are of another matrix.

    Notes
    -----
    A product costs a hash of its vector and a file of its own size, ``8 n k`` bytes in float64; none
    is ever removed. Files are written under another name, flushed and renamed, so that none is ever
    half there. Random start vectors have to be the same at each start: ``eigsh(..., v0=...)``. With
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
        self.made = self.repeated = 0
        self._path = Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        self._recognize()

    def _recognize(self) -> None:
        """Refuse a directory that was written for another matrix."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[1], 1, generator=generator, dtype=self.space.dtype)
        now: Tensor = (self.parts[0] @ v.to(self.device)).cpu()
        file = self._path / "matrix.pt"
        if not file.exists():
            _write(file, now)
            return
        then = torch.load(file, weights_only=True)
        if then.shape != now.shape or then.dtype != now.dtype or not torch.equal(then, now):
            raise ValueError(
                f"Journal({self.parts[0]!r}): the products in {self._path} are of another matrix; pass a "
                "directory of its own for each matrix, or remove this one"
            )

    def _apply(self, V: Tensor) -> Tensor:
        return self._remembered(V, self.parts[0], "")

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self._remembered(U, self.parts[0].T, "transposed ")

    def _remembered(self, V: Tensor, A: LinearOperator, kind: str) -> Tensor:
        bits = V.detach().cpu().contiguous().numpy()
        key = hashlib.blake2b(f"{kind}{bits.shape}{bits.dtype}".encode(), digest_size=16)
        key.update(bits.data)
        file = self._path / f"{key.hexdigest()}.pt"
        if file.exists():
            self.repeated += V.shape[1]
            found: Tensor = torch.load(file, weights_only=True).to(V.device)
            return found
        Y: Tensor = A @ V
        _write(file, Y.cpu())
        self.made += V.shape[1]
        return Y

    def report(self) -> str:
        """How many products were made, and how many taken from the files; and what the operator reports."""
        inner = str(super().report())
        own = f"journal {self._path}: {self.made} products made, {self.repeated} repeated"
        return "\n".join(filter(None, (own, inner)))


def _write(file: Path, tensor: Tensor) -> None:
    """All of a file, or nothing of it."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with open(partial, "wb") as stream:
        torch.save(tensor.clone(), stream)  # of a view the whole memory would be written
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
