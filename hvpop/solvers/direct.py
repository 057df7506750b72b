"""A direct solver, for operators small enough to be written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments, measured
from . import checks, convergence


class Direct:
    """Solve ``A x = b`` by writing ``A`` out, n products, and factorizing it; it knows the determinant.

    The factors of the last operator are kept for as long as it is the same matrix, so that in
    ``Inverse(A, solve=Direct())`` a linearized ``A`` is factorized once.

    Warns
    -----
    NotConverged
        If ``A x`` is known to no digit: ``A`` is singular up to rounding, and ``b`` not in its range. A
        pivot that is zero is an error.

    Notes
    -----
    LU with partial pivoting: O(n^3) arithmetic and n^2 memory.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Dense
    >>> from hvpop.solvers import Direct
    >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64), symmetric=True)
    >>> Direct()(A, torch.tensor([3.0, 4.0], dtype=torch.float64))
    tensor([1., 1.], dtype=torch.float64)
    >>> round(Direct().logdet(A), 6)  # log 5
    1.609438
    """

    def __init__(self) -> None:
        self._of: LinearOperator | None = None

    def __call__(self, A: LinearOperator, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``(n,)`` or ``(n, k)``."""
        self._factorize(A)
        B = checks.columns("Direct", A, b)
        X: Tensor = torch.linalg.lu_solve(self._LU, self._pivots, B)
        rounding = A.shape[0] * torch.finfo(X.dtype).eps * self._size * checks.norms(X)
        if bool((rounding > checks.norms(B)).any()):
            convergence.warn(
                f"Direct: {A!r} is singular up to rounding, and so is the answer; damp it, or use lsmr"
            )
        return X.reshape(b.shape)

    def logdet(self, A: LinearOperator) -> float:
        """``log det A``, for a positive determinant."""
        self._factorize(A)
        swaps = self._pivots.long() != torch.arange(1, A.shape[0] + 1, device=A.device)
        diagonal = self._LU.diagonal()
        if int(swaps.sum() + (diagonal < 0).sum()) % 2:
            raise ValueError(f"Direct: the determinant of {A!r} is negative; it has no logarithm")
        return float(diagonal.abs().log().sum())

    def _factorize(self, A: LinearOperator) -> None:
        A = arguments.square("Direct", A, "use lsmr").linearize()
        if A is self._of and A.is_current():
            return
        dense = A.to_dense()
        if not bool(dense.isfinite().all()):
            raise FloatingPointError(f"Direct: {A!r} has entries that are not finite")
        LU, pivots, info = torch.linalg.lu_factor_ex(dense)
        if int(info) or bool((LU.diagonal() == 0).any()):
            raise ValueError(f"Direct: {A!r} is singular; damp it, or use lsmr")
        self._LU, self._pivots, self._of = LU, pivots, A
        unit = measured.unit(dense)
        self._size = unit * float((dense / unit).square().sum().sqrt())
