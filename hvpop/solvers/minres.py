"""Minimal residuals for symmetric systems that may be indefinite or singular, in lock-step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.checkpoint import Place
from . import checks, lockstep
from .lockstep import BREAKDOWN, GO, reciprocal
from .results import Callback, SolveResult


def minres(
    A: LinearOperator,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_steps: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    checkpoint: Place | None = None,
) -> SolveResult:
    """Solve ``A x = b`` for a symmetric ``A``, indefinite or singular, by minimal residuals.

    The arguments, the sharing of passes and the statuses are those of `cg`, without "negative
    curvature". A singular system is solved if ``b`` is in the range of ``A``; otherwise the status is
    "stagnated" and, without a preconditioner, ``x`` minimises ``|b - A x|``.

    Notes
    -----
    C. C. Paige, M. A. Saunders (1975). The preconditioner must be positive definite even where ``A``
    is not. Memory: eleven blocks ``(n, k)`` beside ``b``, that of a product included, and four more
    while a column that seems to be done is checked.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.solvers import minres
    >>> A = Diagonal(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    >>> minres(A, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)).x
    tensor([ 1.0000, -0.5000,  0.0000], dtype=torch.float64)
    >>> minres(A, torch.ones(3, dtype=torch.float64)).status  # nothing solves 0 x = 1
    ('stagnated',)
    """
    checks.symmetric("minres", A)
    recurrence = _MinimalResiduals(A, checks.preconditioner("minres", A, preconditioner))
    return lockstep.solve(
        recurrence, b, x0, rtol=rtol, atol=atol, max_steps=max_steps, callback=callback,
        progress=progress, checkpoint=checkpoint,
    )  # fmt: skip


@dataclass
class _State(lockstep.State):
    X_start: Tensor  # (n, k)
    R: Tensor  # (n, k), residuals
    Q: Tensor  # (n, k), Lanczos vectors, orthonormal in the inner product of M
    Q_last: Tensor  # (n, k)
    Z: Tensor  # (n, k), M Q
    D: Tensor  # (n, k), the last two columns of Z R^-1 for the triangular factor R
    D_last: Tensor  # (n, k)
    beta: Tensor  # (k,), the off-diagonal of T that leads to Q
    phi: Tensor  # (k,), |r| in the norm of M
    c: Tensor  # (k,), the last two plane rotations
    s: Tensor  # (k,)
    c_last: Tensor  # (k,)
    s_last: Tensor  # (k,)
    size: Tensor  # (k,), of T as far as it is known
    error_then: Tensor  # (k,), |r| when it last fell by a hundredth
    moved_then: Tensor  # (k,), |x - x_start| then
    start_size: Tensor  # (k,), |x_start|


class _MinimalResiduals(lockstep.Recurrence[_State]):
    who, state_type = "minres", _State
    vectors = ("X", "X_start", "R", "Q", "Q_last", "Z", "D", "D_last")

    def start(self, B: Tensor, X: Tensor | None) -> _State:
        R = self.residual(B, X)
        Z, squares = self.precondition(R)
        phi = squares.sqrt().to(R)
        zero, one = torch.zeros_like(phi), torch.ones_like(phi)
        Q, Z = self._scaled(R.clone(), None if Z is R else Z, phi)
        return _State(
            X=torch.zeros_like(R) if X is None else X,
            X_start=torch.zeros_like(R) if X is None else X.clone(),
            error=self.norms(R),
            halt=torch.full_like(phi, GO, dtype=torch.long),
            R=R,
            Q=Q,
            Q_last=torch.zeros_like(R),
            Z=Z,
            D=torch.zeros_like(R),
            D_last=torch.zeros_like(R),
            beta=zero.clone(),
            phi=phi,
            c=one.clone(),
            s=zero.clone(),
            c_last=one,
            s_last=zero.clone(),
            size=zero,
            error_then=self.norms(R),
            moved_then=torch.zeros_like(phi),
            start_size=torch.zeros_like(phi) if X is None else self.norms(X),
        )

    def error_at(self, B: Tensor, X: Tensor) -> Tensor:
        return self.norms(self.residual(B, X))

    def step(self, t: _State) -> None:
        # Lanczos: one more column of T
        Y = self.product(t.Z)
        form, squares, of_products = self.space.together((t.Z, Y), (t.Z, t.Z), (Y, Y))
        self.learn(squares.sqrt(), of_products.sqrt())
        alpha = form.to(Y)

        def orthogonalized(part: slice) -> None:
            Y[part].addcmul_(t.Q[part], alpha, value=-1)
            Y[part].addcmul_(t.Q_last[part], t.beta, value=-1)

        MY, of_next = self.precondition(Y, orthogonalized)
        beta = of_next.sqrt().to(Y)
        t.size = torch.maximum(t.size, torch.hypot(torch.hypot(t.beta, alpha), beta))
        beta = torch.where(beta <= self.eps * t.size, 0.0, beta)
        Q, Z = self._scaled(Y, None if MY is Y else MY, beta)

        # the two rotations before act on that column, then a new one removes its last entry
        epsilon = t.s_last * t.beta
        delta = t.s * alpha + t.c * t.c_last * t.beta
        gamma_bar = t.c * alpha - t.s * t.c_last * t.beta
        gamma = torch.hypot(gamma_bar, beta)

        # |A r| / |r| before this step: where it is nothing but rounding, no step reduces the residual.
        # Short of that, an x that runs away while its residual stays has met a singular system.
        slope = torch.hypot(gamma_bar, t.c * beta)
        moved = self._moved(t)
        falls = t.error <= 0.99 * t.error_then
        t.error_then = torch.where(falls, t.error, t.error_then)
        t.moved_then = torch.where(falls, moved, t.moved_then)
        usual = t.start_size + t.error / self.scale
        runs_away = moved > 10 * torch.maximum(t.moved_then, usual)
        flat = (slope <= 4 * self.eps * t.size) | (gamma == 0) | runs_away
        t.halt = torch.where(flat, BREAKDOWN, GO)

        inverse = torch.where(flat, 0.0, reciprocal(gamma))
        c, s = gamma_bar * inverse, torch.where(flat, 1.0, beta * inverse)
        D = t.D_last.mul_(-epsilon).addcmul_(t.D, delta, value=-1).add_(t.Z).mul_(inverse)
        t.X.addcmul_(D, c * t.phi)
        t.phi = -s * t.phi
        kept, added = torch.where(flat, 1.0, s * s), torch.where(flat, 0.0, c * t.phi)
        square = self.space.together(
            (t.R, t.R), first=lambda part: t.R[part].mul_(kept).addcmul_(Q[part], added)
        )[0]
        t.error = square.sqrt().to(t.R)
        t.Q_last, t.Q, t.Z, t.D_last, t.D, t.beta = t.Q, Q, Z, t.D, D, beta
        t.c_last, t.s_last, t.c, t.s = t.c, t.s, c, s

    def _moved(self, t: _State) -> Tensor:
        """``|x - x_start|``, without a block for the difference: what cancels is small beside ``x_start``."""
        if not bool(t.start_size.any()):
            return self.norms(t.X)
        squares, both = self.space.together((t.X, t.X), (t.X, t.X_start))
        return (squares - 2 * both + t.start_size.double().square()).clamp_min(0).sqrt().to(t.X)

    def _scaled(self, Y: Tensor, MY: Tensor | None, beta: Tensor) -> tuple[Tensor, Tensor]:
        """``Y / beta`` and ``M Y / beta``, in their memory; one and the same without ``M``."""
        scale = reciprocal(beta)
        Q = Y.mul_(scale)
        return Q, Q if MY is None else MY.mul_(scale)
