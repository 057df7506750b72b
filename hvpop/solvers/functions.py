"""Functions of a symmetric operator, f(A) v, by Lanczos with an estimate of the error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.algebra import Composite
from . import checks
from .inverse import NotConverged
from .lanczos import Lanczos
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
        lie between the extreme eigenvalues.
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
    Each column has its own Krylov space, fully reorthogonalized, and all share each pass. The error
    estimate compares iterates some steps apart and assumes that they go on converging as fast as
    they did (after Y. Saad 1992 and A. Frommer, V. Simoncini 2008): an estimate, not a bound.
    Smooth functions converge fast; "sign" and "abs" need as many steps as it takes to resolve the
    eigenvalues next to zero.

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
        super().__init__((A,), A.shape, symmetric=True)
        self.f, self.rtol, self.atol = f, rtol, atol
        self.max_steps = min(A.shape[0], 200) if max_steps is None else max_steps

    def evaluate(self, V: Tensor, *, progress: bool = False) -> FunctionResult:
        """``f(A) V`` for ``(n,)`` or ``(n, k)``, with an error estimate for each column."""
        A = self.parts[0].linearize()
        columns = checks.columns("matrix_function", A, V, "V")
        run = _Evaluation(A, columns, self._value, self.rtol, self.atol)
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
            warnings.warn(f"{self!r}: {result}", NotConverged, stacklevel=2)
        return result.y

    def _value(self, ritz: Tensor, noise: Tensor) -> Tensor:
        """``f`` at the Ritz values ``(k, m)``; what rounding made negative counts as zero."""
        if isinstance(self.f, str):
            function, allowed = _FUNCTIONS[self.f]
            if allowed is not None:
                ritz = torch.where((ritz < 0) & (ritz >= -noise), 0.0, ritz)
        else:
            function, allowed = self.f, None
        values = function(ritz)
        if values.shape != ritz.shape or not bool(values.isfinite().all()):
            lowest, highest = ritz.min().item(), ritz.max().item()
            raise ValueError(
                f"{self!r}: f must be finite on the spectrum{allowed or ''}; "
                f"its Ritz values lie in [{lowest:.3g}, {highest:.3g}]; damp the operator"
            )
        return values

    def _label(self) -> str:
        return f"MatrixFunction({self.f if isinstance(self.f, str) else 'f'})"


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "sqrt": (torch.sqrt, ", which must not be negative"),
    "invsqrt": (torch.rsqrt, ", which must be positive"),
    "log": (torch.log, ", which must be positive"),
    "exp": (torch.exp, None),
    "abs": (torch.abs, None),
    "sign": (torch.sign, None),
}


class _Evaluation:
    """``y = |v| Q f(T) e1`` for the running columns of a Lanczos recurrence, checked now and then."""

    def __init__(
        self,
        A: LinearOperator,
        V: Tensor,
        value: Callable[[Tensor, Tensor], Tensor],
        rtol: float,
        atol: float,
    ) -> None:
        k = V.shape[1]
        self.lanczos = Lanczos(A, V)
        self.value, self.rtol, self.atol = value, rtol, atol
        self.norms = torch.linalg.vector_norm(V, dim=0)  # (k,)
        self.y = torch.zeros_like(V)
        self.errors = torch.where(self.norms > 0, V.new_tensor(torch.inf), 0.0)  # (k,)
        self.targets = V.new_full((k,), atol)
        self.status: list[Status] = ["max steps" if norm else "converged" for norm in self.norms]
        self.history: list[Tensor] = []
        self.lanczos.drop(self.norms == 0)
        running = self.lanczos.columns.numel()
        self.past = V.new_zeros(running, 0)  # coefficients of y at the last check
        self.change = V.new_full((running,), torch.inf)  # how far y had moved then
        self.gap = 1  # steps between the two checks before

    @property
    def running(self) -> bool:
        return self.lanczos.columns.numel() > 0

    def step(self) -> None:
        self.lanczos.step()
        steps = self.lanczos.steps
        due = steps >= self.past.shape[1] + max(_GAP, steps // 8)
        if due or bool(self.lanczos.invariant.any()):
            self.check()

    def check(self) -> None:
        """Estimate the errors; what is done leaves the recurrence."""
        gap = self.lanczos.steps - self.past.shape[1]
        if gap == 0:
            return
        at, exact = self.lanczos.columns, self.lanczos.invariant
        coefficients, rounding = self._coefficients()
        padded = torch.nn.functional.pad(self.past, (0, gap))
        change = torch.linalg.vector_norm(coefficients - padded, dim=1)
        # If y moves on by this ratio from check to check, what is ahead is a geometric series; it
        # may also slow down, hence twice its sum, and never less than the error of the last check.
        ratio = (change / self.change) ** (gap / self.gap)
        ahead = torch.where(ratio < 1, ratio / (1 - ratio), torch.inf)
        errors = torch.maximum(change * (2 * ahead).clamp_min(1.0), rounding)
        if self.past.shape[1] == 0:
            errors = torch.full_like(errors, torch.inf)  # one iterate, nothing to compare it with
        errors = torch.where(exact, rounding, errors)
        norms = torch.linalg.vector_norm(coefficients, dim=1)
        targets = (self.rtol * norms).clamp_min(self.atol)
        self.errors[at], self.targets[at] = errors, targets
        row = torch.full_like(self.errors, torch.nan)
        row[at] = errors
        self.history.append(row)

        converged = errors <= targets
        done = converged | exact | (errors <= rounding)
        for column, good in zip(at[done].tolist(), converged[done].tolist(), strict=True):
            self.status[column] = "converged" if good else "stagnated"
        self._write(done, coefficients)
        self.past, self.change, self.gap = coefficients[~done], change[~done], gap
        self.lanczos.drop(done)

    def result(self, V: Tensor, status: Status) -> FunctionResult:
        """What there is; columns still running get this status unless a last look clears them."""
        if self.running:
            self.check()
        for column in self.lanczos.columns.tolist():
            self.status[column] = status
        self._write(torch.ones_like(self.lanczos.columns, dtype=torch.bool), self.past)
        return FunctionResult(
            y=self.y.squeeze(1) if V.ndim == 1 else self.y,
            errors=self.errors,
            targets=self.targets,
            status=tuple(self.status),
            history=torch.stack(self.history) if self.history else self.errors.new_zeros(0, 1),
            steps=self.lanczos.steps,
            products=self.lanczos.products,
        )

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """``|v| f(T) e1``, ``(r, steps)``, and what rounding leaves uncertain of its norm, ``(r,)``."""
        m, lanczos = self.lanczos.steps, self.lanczos
        ritz, S = torch.linalg.eigh(lanczos.T[:, :m, :m])
        values = self.value(ritz, 10 * lanczos.eps * lanczos.size.unsqueeze(1))
        norms = self.norms[lanczos.columns]
        coefficients = S @ (values * S[:, 0]).unsqueeze(2)
        rounding = 4 * lanczos.eps * m**0.5 * norms * values.abs().amax(1)
        return norms.unsqueeze(1) * coefficients.squeeze(2), rounding

    def _write(self, rows: Tensor, coefficients: Tensor) -> None:
        if bool(rows.any()):
            basis = self.lanczos.Q[rows, : coefficients.shape[1]]  # (r, steps, n)
            y = (coefficients[rows].unsqueeze(1) @ basis).squeeze(1)
            self.y[:, self.lanczos.columns[rows]] = y.T


_GAP = 4  # steps between checks at first, each of which diagonalizes T
