"""Functions of a symmetric operator, f(A) v, by Lanczos with an estimate of the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.algebra import Composite
from . import checks, convergence
from .evaluation import Evaluation, Scalar
from .progress import Bar
from .results import FunctionResult, Status, worst

Function = Literal["sqrt", "invsqrt", "log", "exp", "abs", "sign"]


def matrix_function(
    A: LinearOperator,
    f: Function | Callable[[Tensor], Tensor],
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_steps: int | None = None,
) -> MatrixFunction:
    """The operator ``f(A) = U f(eigenvalues) U'`` of a symmetric ``A``, by Lanczos.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, order n. If it follows a live model, so does ``f(A)``.
    f
        ``"sqrt"``, ``"invsqrt"``, ``"log"``, ``"exp"``, ``"abs"``, ``"sign"``, or a torch function of
        eigenvalues, elementwise on a tensor of any shape. It is evaluated at Ritz values, which
        lie between the extreme eigenvalues, and, for the error alone, on both sides of zero up to twice
        the size of ``A``; there it may be nan or infinite. To "sign" what is zero up to rounding is zero.
    rtol, atol
        A column has converged when its error estimate is at most ``max(rtol * |f(A) v|, atol)``.
    max_steps
        ``min(n, 200)`` by default: the memory is one block ``(n, k)`` per step.

    Returns
    -------
    MatrixFunction
        An operator; its `evaluate` gives the product with the error estimate.

    Notes
    -----
    Each column has its own Krylov space, fully reorthogonalized, and all share each pass. The error is
    an estimate, not a bound, and the largest of three. One compares iterates some steps apart and
    assumes that they go on converging as fast as they did (after Y. Saad 1992 and A. Frommer,
    V. Simoncini 2008). One is what rounding does. One is for functions that may bend or jump at zero,
    which are all but "sqrt", "invsqrt", "log" and "exp": what eigenvalues near zero may contribute that
    no Ritz value has shown yet. It has "abs" and "sign" go on until the eigenvalues next to zero are
    resolved, or all that ``v`` may have there is below the tolerance. A function that bends or jumps at
    another place ``c`` is safe as a function of ``A - c I``.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.solvers import matrix_function
    >>> A = Diagonal(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    >>> v = torch.ones(3, dtype=torch.float64)
    >>> (matrix_function(A, "sqrt") @ v).round(decimals=12)
    tensor([1., 2., 3.], dtype=torch.float64)
    >>> matrix_function(A, lambda t: 1 / (t + 1)).evaluate(v).status
    ('converged',)
    """
    return MatrixFunction(A, f, rtol=rtol, atol=atol, max_steps=max_steps)


class MatrixFunction(Composite):
    """``f(A)`` as an operator: see `matrix_function`.

    Products warn with `NotConverged` where the tolerance is not met.
    """

    def __init__(
        self,
        A: LinearOperator,
        f: Function | Callable[[Tensor], Tensor],
        *,
        rtol: float = 1e-6,
        atol: float = 0.0,
        max_steps: int | None = None,
    ) -> None:
        checks.symmetric("matrix_function", A, "only symmetric ones have functions here")
        checks.limits("matrix_function", rtol, atol, max_steps)
        if isinstance(f, str) and f not in _FUNCTIONS:
            raise ValueError(
                f"matrix_function knows {', '.join(_FUNCTIONS)} or a callable, got {f!r}"
            )
        if not isinstance(f, str) and not callable(f):
            raise TypeError(
                f"matrix_function expects f as a name or a function of eigenvalues, got {f!r:.60}"
            )
        super().__init__((A,), A.shape, symmetric=True)
        self.f, self.rtol, self.atol = f, rtol, atol
        self.max_steps = min(A.shape[0], 200) if max_steps is None else max_steps

    def evaluate(self, V: Tensor, *, progress: bool = False) -> FunctionResult:
        """``f(A) V`` for ``(n,)`` or ``(n, k)``, with an error estimate for each column."""
        A = self.parts[0].linearize()
        columns = checks.columns("matrix_function", A, V, "V")
        f = _FUNCTIONS[self.f] if isinstance(self.f, str) else Scalar(self.f)
        run = Evaluation(repr(self), f, A, columns, self.rtol, self.atol)
        bar = Bar("matrix_function", progress)
        status: Status = "max steps"
        try:
            while run.running and run.lanczos.steps < self.max_steps:
                run.step()
                bar.update(lambda: f"error {worst(run.errors, run.targets)}")
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            bar.close()
        return run.result(V, status)

    def _apply(self, V: Tensor) -> Tensor:
        result = self.evaluate(V)
        if not result.converged:
            convergence.warn(f"{self!r}: {result}; {convergence.cure(result.status)}")
        return result.y

    def _label(self) -> str:
        return f"MatrixFunction({self.f if isinstance(self.f, str) else 'f'})"


_FUNCTIONS = {
    "sqrt": Scalar(torch.sqrt, ", which must not be negative", zero=(1, 0), smooth=True),
    "invsqrt": Scalar(torch.rsqrt, ", which must be positive", zero=(1, 0), smooth=True),
    "log": Scalar(torch.log, ", which must be positive", zero=(1, 0), smooth=True),
    "exp": Scalar(torch.exp, smooth=True),
    "abs": Scalar(torch.abs),
    "sign": Scalar(torch.sign, zero=(1, 1)),
}
