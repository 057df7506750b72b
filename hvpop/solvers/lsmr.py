"""Least squares with a rectangular operator, by LSMR in lock-step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.checkpoint import Place
from . import lockstep
from .lockstep import BREAKDOWN, GO, reciprocal
from .results import Callback, LeastSquaresResult


def lsmr(
    A: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_steps: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    checkpoint: Place | None = None,
) -> LeastSquaresResult:
    """Minimise ``|A x - b|^2 + damping |x|^2`` for an ``A`` of any shape, by LSMR.

    All columns of ``b`` share each pass over ``A`` and over ``A'``. What is measured is the gradient
    ``g = A'(b - A x) - damping x``, which is zero at the solution whether or not ``A x = b`` has one;
    "converged" is said only of ``g`` computed from ``x``.

    Parameters
    ----------
    A : LinearOperator
        ``(m, n)``, with a transpose; linearized here.
    b : Tensor
        ``(m,)``, or ``(m, k)`` for k problems.
    damping
        Not negative; ``x`` solves ``(A'A + damping I) x = A'b``.
    rtol, atol
        A column has converged when ``|g| <= max(rtol * |A'b|, atol)``. Where ``A'b`` is nothing but
        rounding, ``b`` being orthogonal to the range of ``A``, ``x = 0`` is the answer, and the target
        is what rounding leaves: ``8 eps |A| |b|``, with ``|A|`` as far as the products have shown it.
    x0, max_steps, callback, progress, checkpoint
        As in `cg`; ``x0`` has n rows, and 10 min(m, n) steps are the default limit.

    Returns
    -------
    LeastSquaresResult
        `residual_norms` are of ``b - A x``, `gradient_norms` of ``g``; `history` follows ``|g|``. From
        ``x0 = 0`` and without damping ``x`` is the shortest of the minimisers. The statuses are those
        of `cg`, without "negative curvature".

    Notes
    -----
    D. C.-L. Fong, M. Saunders (2011): MINRES on the normal equations, without squaring the condition
    of the vectors. Two products per step and column, three blocks ``(n, k)`` and one ``(m, k)``.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Dense
    >>> from hvpop.solvers import lsmr
    >>> A = Dense(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    >>> result = lsmr(A, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    >>> result.x, result.residual_norms
    (tensor([1.0000, 0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    arguments.operator("lsmr", A)
    arguments.not_negative("lsmr", damping=damping)
    recurrence = _LeastSquares(A, math.sqrt(damping))
    result = lockstep.solve(
        recurrence, b, x0, rtol=rtol, atol=atol, max_steps=max_steps, callback=callback,
        progress=progress, checkpoint=checkpoint,
    )  # fmt: skip
    B, X = (M if M.ndim == 2 else M.unsqueeze(1) for M in (b.detach().to(result.x), result.x))
    known = {f.name: getattr(result, f.name) for f in fields(result)}
    known["residual_norms"] = recurrence.norms(B - recurrence.A @ X)
    known["products"] += X.shape[1]
    return LeastSquaresResult(**known, gradient_norms=result.residual_norms)


@dataclass
class _State(lockstep.State):
    U: Tensor  # (m, k), left vectors of the bidiagonalization; (m + n, k) with damping
    V: Tensor  # (n, k), right vectors
    H: Tensor  # (n, k), directions of LSQR
    H_bar: Tensor  # (n, k), directions of LSMR
    alpha: Tensor  # (k,), the last diagonal entry of the bidiagonal
    alpha_bar: Tensor  # (k,)
    rho: Tensor  # (k,), from the first QR factorization
    rho_bar: Tensor  # (k,), from the second
    c_bar: Tensor  # (k,), its rotation
    s_bar: Tensor  # (k,)
    zeta_bar: Tensor  # (k,), |gradient| up to sign
    size: Tensor  # (k,), of the bidiagonal as far as it is known
    rest: Tensor  # (k,), |residual| of the damped problem at the (re)start


class _LeastSquares(lockstep.Recurrence[_State]):
    """Works on the damped problem as ``[A; root I] x = [b; 0]``, so that a restart is a plain start."""

    who, state_type = "lsmr", _State
    vectors = ("X", "U", "below U", "V", "H", "H_bar")

    def __init__(self, A: LinearOperator, root: float) -> None:
        super().__init__(A)
        self.root = root

    def settings(self) -> dict[str, Any]:
        return {"root of damping": self.root}

    def pack(self, state: _State) -> dict[str, Any]:
        packed, m = super().pack(state), self.A.held[0]
        return packed | {"U": state.U[:m], "below U": state.U[m:]} if self.root else packed

    def unpack(self, packed: Mapping[str, Any]) -> _State:
        fields = dict(packed)
        if self.root:
            fields["U"] = torch.cat([fields["U"], fields.pop("below U")])
        return super().unpack(fields)

    def extended(self, B: Tensor) -> Tensor:
        return torch.cat([B, B.new_zeros(self.A.held[1], B.shape[1])]) if self.root else B

    def start(self, B: Tensor, X: Tensor | None) -> _State:
        U = B.clone() if X is None else B - self._forward(X)
        beta = self.norms(U)
        U = U * reciprocal(beta)
        V = self._back(U)
        alpha = self.norms(V)
        V = V * reciprocal(alpha)
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        return _State(
            X=torch.zeros_like(V) if X is None else X,
            error=alpha * beta,
            halt=torch.full_like(alpha, GO, dtype=torch.long),
            U=U,
            V=V,
            H=V.clone(),
            H_bar=torch.zeros_like(V),
            alpha=alpha,
            alpha_bar=alpha.clone(),
            rho=one,
            rho_bar=one.clone(),
            c_bar=one.clone(),
            s_bar=zero,
            zeta_bar=alpha * beta,
            size=alpha.clone(),
            rest=beta,
        )

    def step(self, t: _State) -> None:
        # Golub-Kahan: one more row and column of the bidiagonal
        U = self._forward(t.V).addcmul_(t.U, t.alpha, value=-1)
        beta = self.norms(U)
        U *= reciprocal(beta)
        V = self._back(U).addcmul_(t.V, beta, value=-1)
        alpha = self.norms(V)
        t.size = torch.maximum(t.size, torch.hypot(alpha, beta))
        alpha = torch.where(alpha <= self.eps * t.size, 0.0, alpha)
        V *= reciprocal(alpha)

        # QR of the bidiagonal, then QR of the transpose of its factor
        rho = torch.hypot(t.alpha_bar, beta)
        c, s = t.alpha_bar * reciprocal(rho), beta * reciprocal(rho)
        theta = s * alpha
        theta_bar = t.s_bar * rho
        rho_bar = torch.hypot(t.c_bar * rho, theta)
        # no singular value of A is this small: the direction is rounding
        flat = (rho <= self.eps * t.size) | (rho_bar <= self.eps * t.size)
        t.halt = torch.where(flat, BREAKDOWN, GO)
        c_bar = t.c_bar * rho * reciprocal(rho_bar)
        s_bar = theta * reciprocal(rho_bar)
        zeta = torch.where(flat, 0.0, c_bar * t.zeta_bar)

        t.H_bar = t.H - (theta_bar * reciprocal(t.rho)) * (rho * reciprocal(t.rho_bar)) * t.H_bar
        t.X.addcmul_(t.H_bar, zeta * reciprocal(rho) * reciprocal(rho_bar))
        t.H = V - (theta * reciprocal(rho)) * t.H
        t.zeta_bar = torch.where(flat, t.zeta_bar, -s_bar * t.zeta_bar)
        # beside an infinite size everything would pass for rounding
        t.error = torch.where(t.size.isfinite(), t.zeta_bar.abs(), torch.nan)
        t.U, t.V, t.alpha, t.alpha_bar = U, V, alpha, c * alpha
        t.rho, t.rho_bar, t.c_bar, t.s_bar = rho, rho_bar, c_bar, s_bar

    def error_unit(self) -> float:
        return self.unit or 1.0

    def floor(self, state: _State) -> Tensor:
        return self.scale * (super().floor(state) + 8 * self.eps * state.rest)

    def noise(self, B: Tensor) -> Tensor:
        """What rounding leaves of ``A'b`` where it is zero."""
        sizes = self.norms(B)
        return 8 * self.eps * self.scale * sizes

    def _forward(self, V: Tensor) -> Tensor:
        AV = self.multiply(V)
        return torch.cat([AV, self._root() * V]) if self.root else AV

    def _back(self, U: Tensor) -> Tensor:
        m = self.A.held[0]
        AU = self.noted(U[:m], self.counted(U[:m], self.A.T @ U[:m]))
        return AU + self._root() * U[m:] if self.root else AU

    def _root(self) -> float:
        return self.root / (self.unit or 1.0)
