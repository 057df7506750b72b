"""f(A) V for many columns by Lanczos, with an estimate of each one's error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import LinearOperator
from . import checks
from .lanczos import Lanczos
from .results import FunctionResult, Status
from .unresolved import unresolved


@dataclass(frozen=True)
class Scalar:
    """A function of eigenvalues, and what is known of it."""

    f: Callable[[Tensor], Tensor]
    domain: str = ""
    zero: tuple[int, int] = (0, 0)  # how far below and above zero counts as zero, in roundings
    smooth: bool = False  # on its domain

    def __call__(self, x: Tensor, rounding: Tensor) -> Tensor:
        """The values at ``x``."""
        below, above = self.zero
        near = (x >= -below * rounding) & (x <= above * rounding)
        return self.f(torch.where(near, 0.0, x))


class Evaluation:
    """``y = |v| Q f(T) e1`` for the running columns of a Lanczos recurrence, checked now and then."""

    def __init__(
        self, who: str, f: Scalar, A: LinearOperator, V: Tensor, rtol: float, atol: float
    ) -> None:
        k = V.shape[1]
        self.who, self.f, self.rtol, self.atol = who, f, rtol, atol
        self.lanczos = Lanczos(A, V)
        self.norms = checks.norms(V)  # (k,)
        self.y = torch.zeros_like(V)
        self.errors = torch.where(self.norms > 0, V.new_tensor(torch.inf), 0.0)  # (k,)
        self.targets = V.new_full((k,), atol)
        self.status: list[Status] = ["max steps" if norm else "converged" for norm in self.norms]
        self.history: list[Tensor] = []
        self.lanczos.drop(self.norms == 0)
        running = self.lanczos.columns.numel()
        # in units of |v|:
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
        norms = self.norms[at]
        coefficients, hidden, rounding, shaken = self._project()
        padded = torch.nn.functional.pad(self.past, (0, gap))
        change = checks.norms((coefficients - padded).T)
        # If y moves on by this ratio from check to check, what is ahead is a geometric series; it
        # may also slow down, hence twice its sum, and never less than the error of the last check.
        ratio = (change / self.change) ** (gap / self.gap)
        ahead = torch.where(ratio < 1, 2 * ratio / (1 - ratio), torch.inf).clamp_min(1.0)
        moving = torch.where(change > rounding, change * ahead, change)
        if self.past.shape[1] == 0:
            moving = torch.full_like(moving, torch.inf)  # one iterate, nothing to compare it with
        estimates = torch.where(exact, 0.0, torch.maximum(moving, hidden))
        errors = torch.maximum(estimates, rounding + shaken)
        sizes = checks.norms(coefficients.T)
        targets = torch.maximum(self.rtol * sizes, self.atol / norms)
        self.errors[at], self.targets[at] = errors * norms, targets * norms
        row = torch.full_like(self.errors, torch.nan)
        row[at] = errors * norms
        self.history.append(row)

        converged = errors <= targets
        done = converged | exact | (estimates <= rounding)
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
        if not self.lanczos.A.space.finite(self.y):
            raise FloatingPointError(
                f"{self.who}: f(A) v is larger than {self.y.dtype} holds; scale v, or take float64"
            )
        return FunctionResult(
            y=self.y.squeeze(1) if V.ndim == 1 else self.y,
            errors=self.errors,
            targets=self.targets,
            status=tuple(self.status),
            history=torch.stack(self.history or [self.errors])[: len(self.history)],
            steps=self.lanczos.steps,
            products=self.lanczos.products,
        )

    def _project(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``f(T) e1``, ``(r, steps)``, and three errors of it, ``(r,)``.

        They are what eigenvalues not resolved may hide, what the arithmetic here leaves uncertain, and
        what the rounding of the products does.
        """
        m, lanczos = self.lanczos.steps, self.lanczos
        ritz, S = torch.linalg.eigh(lanczos.T[:, :m, :m])
        shift = lanczos.eps * lanczos.size.unsqueeze(1)

        def f(x: Tensor) -> Tensor:
            return self.f(x, 10 * shift)

        values = f(ritz)
        if not isinstance(values, torch.Tensor) or values.shape != ritz.shape:
            got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(
                f"{self.who}: f must be elementwise: of eigenvalues {tuple(ritz.shape)} it gave {got}"
            )
        if not bool(values.isfinite().all()):
            lowest, highest = ritz.min().item(), ritz.max().item()
            raise ValueError(
                f"{self.who}: f must be finite on the spectrum{self.f.domain}; "
                f"its Ritz values lie in [{lowest:.3g}, {highest:.3g}]; damp the operator"
            )
        coefficients = (S @ (values * S[:, 0]).unsqueeze(2)).squeeze(2)
        rounding = 4 * lanczos.eps * m**0.5 * values.abs().amax(1)
        shaken = _shaken(f, ritz, S[:, 0], shift)
        hidden = torch.zeros_like(rounding)
        if not self.f.smooth:
            hidden = unresolved(f, ritz, values, S, lanczos.size)
        return coefficients, hidden, rounding, shaken

    def _write(self, rows: Tensor, coefficients: Tensor) -> None:
        if bool(rows.any()):
            basis = self.lanczos.Q[rows, : coefficients.shape[1]]  # (r, steps, n)
            y = (coefficients[rows].unsqueeze(1) @ basis).squeeze(1)
            columns = self.lanczos.columns[rows]
            self.y[:, columns] = y.T * self.norms[columns]


def _shaken(f: Callable[[Tensor], Tensor], ritz: Tensor, first: Tensor, shift: Tensor) -> Tensor:
    """How far ``f(T) e1`` moves, to first order, if random rounding moves eigenvalues by ``shift``.

    In the eigenvectors of ``T`` the derivative of ``f`` multiplies the entries of a perturbation by
    divided differences (Y. L. Daleckii, S. G. Krein 1965).
    """
    below, above = f(ritz - shift), f(ritz + shift)
    rise = above.unsqueeze(2) - below.unsqueeze(1)
    slopes = rise / (ritz.unsqueeze(2) - ritz.unsqueeze(1) + 2 * shift.unsqueeze(2))
    slopes = slopes.nan_to_num(0.0).tril()  # elsewhere the two eigenvalues change places
    slopes = slopes + slopes.tril(-1).mT
    return checks.norms((shift.unsqueeze(2) * slopes * first.unsqueeze(1)).flatten(1).T)


_GAP = 4  # steps between checks at first, each of which diagonalizes T
