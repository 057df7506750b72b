"""Conjugate gradients for one or many right-hand sides in lock-step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.checkpoint import Place
from . import checks, lockstep
from .lockstep import BREAKDOWN, GO, NEGATIVE
from .results import Callback, SolveResult


def cg(
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
    """Solve ``A x = b`` for a symmetric positive definite ``A`` by conjugate gradients.

    All columns of ``b`` share each pass: k systems cost one block product per step, and a column
    that is done drops out of it. "converged" is said only of a true residual, ``b - A x`` computed
    from ``x``, which costs one more product per column.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, order n; linearized here.
    b : Tensor
        ``(n,)``, or ``(n, k)`` for k systems. Of the dtype and on the device of ``A``.
    x0 : Tensor, optional
        Where to start, of the shape of ``b``; zero by default, and where ``b`` is zero.
    preconditioner : LinearOperator, optional
        Symmetric positive definite, close to the inverse of ``A``: `nystrom`, `jacobi`, ...
    rtol, atol
        A column has converged when ``|b - A x| <= max(rtol * |b|, atol)``.
    max_steps
        10 n by default.
    callback
        Called with a `Step` after each step; returning True ends the run.
    progress
        Show a progress bar.
    checkpoint : path, optional
        Save there from time to time and at the end; if the file exists, go on from it, to the same bits
        as without a stop. Tolerances and ``max_steps`` may be others than before.

    Returns
    -------
    SolveResult
        Per column one of these statuses; the last iterate is in ``x`` whatever it is.

        - "converged".
        - "negative curvature": ``d'Ad < 0`` beyond rounding for the unit vector ``d`` in
          `directions`: ``A`` is not positive definite. Damp it more, or use `minres`.
        - "stagnated": the recurrence says small, the true residual disagrees, and starting again
          from it did not halve it. The tolerance is below what the dtype allows, or the system is
          singular and has no solution.
        - "max steps".
        - "interrupted": by Ctrl-C or by the callback.

    Raises
    ------
    ValueError, TypeError
        For operands that do not fit ``A``, and for an ``A`` that is not marked symmetric.
    FloatingPointError
        If ``A`` returns non-finite values.

    Notes
    -----
    M. R. Hestenes, E. Stiefel (1952). True residuals and restarts are in the spirit of
    H. A. van der Vorst, Q. Ye (2000). A direction without positive curvature costs one more product,
    which tells what is negative from rounding. Memory: at most six
    blocks ``(n, k)`` beside ``b``, that of a product included; SciPy's takes five.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.solvers import cg
    >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    >>> result = cg(A, torch.ones(3, dtype=torch.float64), rtol=1e-10)
    >>> result.x
    tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    >>> result.status, result.products  # three steps and one check
    (('converged',), 4)
    """
    checks.symmetric("cg", A)
    recurrence = _ConjugateGradients(A, checks.preconditioner("cg", A, preconditioner))
    return lockstep.solve(
        recurrence, b, x0, rtol=rtol, atol=atol, max_steps=max_steps, callback=callback,
        progress=progress, checkpoint=checkpoint,
    )  # fmt: skip


@dataclass
class _State(lockstep.State):
    R: Tensor  # (n, k), residuals
    P: Tensor  # (n, k), search directions
    rho: Tensor  # (k,), r'Mr, float64
    squares: Tensor  # (k,), p'p where there is no M, float64
    reach: Tensor  # (k,), what |x| cannot exceed, float64


class _ConjugateGradients(lockstep.Recurrence[_State]):
    who, state_type = "cg", _State
    vectors = ("X", "R", "P")

    def start(self, B: Tensor, X: Tensor | None) -> _State:
        R = self.residual(B, X)
        Z, rho = self.precondition(R)
        return _State(
            X=torch.zeros_like(B) if X is None else X,
            error=self._error(R, rho),
            halt=torch.full_like(rho, GO, dtype=torch.long),
            R=R,
            P=Z,  # a step takes a copy, and a check needs none
            rho=rho,
            squares=rho,
            reach=torch.full_like(rho, 0.0 if X is None else torch.inf),
        )

    def step(self, state: _State) -> None:
        if state.P is state.R:
            state.P = state.R.clone()
        AP = self.product(state.P)
        if self.M is None:
            # p = r + beta p_last with r'p_last = 0, and then |alpha A p|^2 = |r - r_next|^2: both are free
            (curvature,), squares = self.space.together((state.P, AP)), state.squares
        else:
            pairs = ((state.P, AP), (state.P, state.P), (AP, AP))
            curvature, squares, of_products = self.space.together(*pairs)
            self.learn(squares.sqrt(), of_products.sqrt())
        flat = curvature <= self.eps * self.scale * squares
        stuck = bool(flat.any())
        if stuck:
            # a p from the null space has shown nothing of |A|; the rounding of A p shows more
            self.noted(state.P[:, flat], AP[:, flat])
            again = AP[:, flat]
            self.noted(again, self.multiply(again))
        negative = curvature < -8 * self.eps * self.scale * squares
        state.halt = torch.where(flat, torch.where(negative, NEGATIVE, BREAKDOWN), GO)
        steps = torch.where(flat, 0.0, state.rho / torch.where(flat, 1.0, curvature))
        alpha = steps.to(AP)

        Z, rho = self.precondition(
            state.R, lambda part: state.R[part].addcmul_(AP[part], alpha, value=-1)
        )
        moves = steps.abs() * squares.sqrt()
        if self.M is None:
            self.learn(moves, torch.where(flat, 0.0, state.rho + rho).sqrt())
        state.reach = state.reach + moves
        # a halted column keeps its direction, which is what it has to report
        factors = torch.where(flat, 0.0, rho / torch.where(state.rho > 0, state.rho, 1.0))
        state.squares = torch.where(flat, squares, rho + factors.square() * squares)
        beta = factors.to(AP)

        state.X.addcmul_(state.P, alpha)
        if stuck:
            state.P = torch.where(flat, state.P, torch.addcmul(Z, state.P, beta))
        else:
            torch.addcmul(Z, state.P, beta, out=state.P)
        state.rho = rho
        state.error = self._error(state.R, rho)

    def directions(self, state: _State) -> Tensor:
        return state.P / self.norms(state.P)

    def _error(self, R: Tensor, rho: Tensor) -> Tensor:
        return rho.sqrt().to(self.dtype) if self.M is None else self.norms(R)

    def above_floor(self, state: _State) -> bool:
        floor = 8 * torch.finfo(self.A.torch_dtype).eps * self.scale * state.reach
        return bool((state.error > floor).all())
