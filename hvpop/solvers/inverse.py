"""The inverse of an operator as an operator, and the pseudoinverse of a known spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import LinearOperator, LowRank, arguments
from ..operators.algebra import Composite
from . import convergence
from .results import SolveResult
from .woodbury import Solver, Woodbury, logdet_by


class Inverse(Composite):
    """``A^-1``: every product solves a system; it composes like any operator and takes arrays too.

    Parameters
    ----------
    A : LinearOperator
        Square. If it follows a live model, so does the inverse; linearize for many products.
    solve : callable, optional
        ``solve(A, B)`` for a tensor ``(n, k)`` returns a result with ``x``, or ``x`` itself. With options:
        ``functools.partial(cg, preconditioner=P, rtol=1e-8)``. `minres` where ``A`` is indefinite,
        `Direct` where it is small, `lsmr` where it is not symmetric. By default `Woodbury`, which is direct
        where ``A`` is a diagonal plus a low rank or a product of such, and otherwise `cg`.

    Warns
    -----
    NotConverged
        If the solver's result says so. The product is then the solver's last iterate.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Damped, Dense
    >>> from hvpop.solvers import Direct, Inverse
    >>> H = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64), symmetric=True)
    >>> influence = H @ Inverse(Damped(H, 1.0)) @ H
    >>> influence @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    tensor([ 0.5000, -0.5000], dtype=torch.float64)
    >>> round(Inverse(H, solve=Direct()).logdet(), 6)  # log (1 / 3)
    -1.098612
    """

    def __init__(self, A: LinearOperator, solve: Solver | None = None) -> None:
        arguments.square("Inverse", A, "lsmr solves rectangular systems")
        if solve is not None and not callable(solve):
            raise TypeError(
                f"Inverse expects solve as a function of an operator and columns, such as cg, minres "
                f"or partial(cg, rtol=1e-8), got {solve!r:.60}"
            )
        super().__init__((A,), A.shape, symmetric=A.symmetric)
        self.solve = Woodbury() if solve is None else solve

    @property
    def operator(self) -> LinearOperator:
        """The operator whose inverse this is."""
        return self.parts[0]

    def logdet(self) -> float:
        """``log det A^-1``, where the solver knows it, as `Direct` and `Woodbury` do."""
        return -logdet_by(self.solve, self.operator, f"{self!r}:")

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return self._solved(self.operator, V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self._solved(self.operator.T, U)

    def _solved(self, A: LinearOperator, V: Tensor) -> Tensor:
        result = self.solve(A, V)
        if isinstance(result, Tensor):
            return result
        if not isinstance(result, SolveResult):
            raise TypeError(
                f"{self!r} expects its solver to return a SolveResult or the solution as a tensor, "
                f"got {type(result).__name__}"
            )
        if not result.converged:
            convergence.warn(f"{self!r}: {result}; {convergence.cure(result.status)}")
        return result.x


def pseudoinverse(
    eigenvalues: Tensor, eigenvectors: Tensor, *, rtol: float | None = None
) -> LowRank:
    """The pseudoinverse of ``U diag(eigenvalues) U'``: inverted where it is not zero, zero elsewhere.

    Parameters
    ----------
    eigenvalues : Tensor
        ``(k,)``, of either sign.
    eigenvectors : Tensor
        ``(n, k)``, orthonormal columns ``U``.
    rtol
        Eigenvalues of size up to ``rtol`` times the largest count as zero; by default n times the
        rounding unit.

    Examples
    --------
    >>> import torch
    >>> from hvpop.solvers import pseudoinverse
    >>> U = torch.eye(3, dtype=torch.float64)
    >>> A = pseudoinverse(torch.tensor([4.0, -2.0, 1e-17], dtype=torch.float64), U)
    >>> A @ torch.ones(3, dtype=torch.float64)
    tensor([ 0.2500, -0.5000,  0.0000], dtype=torch.float64)
    """
    if eigenvectors.ndim != 2 or tuple(eigenvalues.shape) != (eigenvectors.shape[1],):
        raise ValueError(
            "pseudoinverse expects eigenvalues (k,) and eigenvectors (n, k), got "
            f"{tuple(eigenvalues.shape)} and {tuple(eigenvectors.shape)}"
        )
    if rtol is None:
        rtol = eigenvectors.shape[0] * torch.finfo(eigenvalues.dtype).eps
    size = eigenvalues.abs()
    kept = size > rtol * (size.max() if size.numel() else 0.0)
    return LowRank(eigenvectors[:, kept], 1 / eigenvalues[kept])
