"""Many damped systems from one Krylov space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators import Damped, LinearOperator, measured
from . import checks
from .cg import cg
from .progress import Bar
from .results import Callback, MultishiftResult, Status, Step, worst


def multishift_cg(
    A: LinearOperator,
    b: Tensor,
    shifts: Sequence[float] | Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_steps: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> MultishiftResult:
    """Solve ``(A + c I) x = b`` for many dampings ``c`` at the products of the hardest one.

    The Krylov space of ``A`` and ``b`` is the same for every shift, so one product per step and column
    of ``b`` serves them all; each shift only adds its own short recurrence. At the end every
    residual is computed from its ``x`` (one product per shift and column, as one block), and what
    rounding has kept above its target is finished by `cg`.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, order n, with ``A + c I`` positive definite; linearized here.
    b : Tensor
        ``(n,)``, or ``(n, k)`` for k right-hand sides.
    shifts
        The s dampings ``c``, in any order.
    rtol, atol, max_steps, callback, progress
        As in `cg`. The callback's `Step` has the first shift's ``x`` and the largest residual norms.

    Returns
    -------
    MultishiftResult
        Statuses as in `cg`, for every shift and column: "negative curvature" of one shift leaves the
        larger ones alone.

    Notes
    -----
    B. Jegerlehner (1996), A. Frommer (2003); written with the Lanczos vectors and one LDL'
    factorization of the shifted tridiagonal per shift (Y. Saad 2003, section 6.7), so that no shift
    leads. There is no preconditioner: it would give each shift a Krylov space of its own. Memory:
    2 s + 4 blocks ``(n, k)``.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.solvers import multishift_cg
    >>> A = Diagonal(torch.tensor([0.0, 1.0], dtype=torch.float64))
    >>> multishift_cg(A, torch.ones(2, dtype=torch.float64), [1.0, 0.1]).x
    tensor([[ 1.0000,  0.5000],
            [10.0000,  0.9091]], dtype=torch.float64)
    """
    checks.symmetric("multishift_cg", A, "solve shift by shift with lsmr")
    checks.limits("multishift_cg", rtol, atol, max_steps)
    checks.callback("multishift_cg", callback)
    B = checks.columns("multishift_cg", A, b)
    try:
        C = torch.as_tensor(shifts, dtype=B.dtype, device=B.device).detach()
    except (TypeError, ValueError):
        C = B.new_empty(0)  # no numbers: refused like an empty list
    if C.ndim != 1 or C.numel() == 0 or not bool(C.isfinite().all()):
        raise ValueError(f"multishift_cg expects shifts as a list of finite numbers, got {shifts}")
    A = A.linearize()
    limit = 10 * A.shape[0] if max_steps is None else max_steps
    family = _Family(A, B, C, rtol, atol)
    bar = Bar("multishift_cg", progress)
    interrupted = False
    try:
        while bool(family.running.any()) and family.steps < limit:
            family.step()
            bar.update(family.worst)
            if checks.stopped("multishift_cg", callback, lambda: family.report(b.ndim == 1)):
                interrupted = True
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    return family.finish(b, limit, interrupted)


class _Family:
    """One Lanczos recurrence for k columns, and for each shift the solution it implies.

    For every shift the tridiagonal ``T + c I = L D L'`` gives ``P = V L^-T`` and ``x = P D^-1 L^-1 |b|``.
    """

    def __init__(self, A: LinearOperator, B: Tensor, C: Tensor, rtol: float, atol: float) -> None:
        s, (n, k) = C.numel(), B.shape
        norms = checks.norms(B)
        self.A, self.B, self.C = A, B, C
        self.unit = 0.0  # not known before the first product; X and P are in units of it
        self.rtol, self.atol = rtol, atol
        self.target = (rtol * norms).clamp_min(atol)  # (k,)
        self.claim = torch.maximum(self.target, torch.finfo(B.dtype).eps * norms)  # by recurrence
        self.steps = self.products = 0
        self.eps = torch.finfo(B.dtype).eps
        self.size = torch.zeros_like(norms)
        self.V = B / torch.where(norms > 0, norms, 1.0)
        self.V_last = torch.zeros_like(B)
        self.beta = torch.zeros_like(norms)
        self.X, self.P = B.new_zeros(s, n, k), B.new_zeros(s, n, k)
        self.D = B.new_ones(s, k)  # the last pivot
        self.zeta = -norms.expand(s, k)  # the last entry of L^-1 |b|, sign to come
        self.error = norms.repeat(s, 1)  # (s, k)
        self.negative = torch.zeros(s, k, dtype=torch.bool, device=B.device)
        self.running = self.error > self.claim
        self.history = [self.error.clone()]

    def step(self) -> None:
        live = self.running.any(0).nonzero().squeeze(1)  # columns with an open shift
        V, V_last, beta = self.V[:, live], self.V_last[:, live], self.beta[live]
        Y: Tensor = self.A @ V
        measured.finite("multishift_cg", self.A, Y)
        self.unit = self.unit or measured.unit(Y, V)
        Y = Y / (self.unit or 1.0)
        self.products += live.numel()
        self.steps += 1
        alpha = self.A.space.dots(V, Y).to(V)
        Y = Y.addcmul(V, alpha, value=-1).addcmul(V_last, beta, value=-1)
        beta_next = checks.norms(Y)
        size = torch.maximum(self.size[live], torch.hypot(alpha, beta_next))
        beta_next = torch.where(beta_next <= self.eps * size, 0.0, beta_next)

        for i, shift in enumerate(self.C):  # a loop, so that a done shift costs nothing
            of_live = self.running[i, live]
            at = live[of_live]
            if at.numel():
                self._advance(
                    i,
                    at,
                    V[:, of_live],
                    alpha[of_live] + shift / (self.unit or 1.0),
                    beta[of_live],
                    beta_next[of_live],
                )
        self.V_last[:, live], self.beta[live], self.size[live] = V, beta_next, size
        self.V[:, live] = Y / torch.where(beta_next > 0, beta_next, 1.0)
        self.history.append(torch.where(self.running, self.error, torch.nan))
        self.running &= ~self.negative & (self.error > self.claim) & (self.beta > 0)

    def _advance(
        self, i: int, at: Tensor, V: Tensor, alpha: Tensor, beta: Tensor, beta_next: Tensor
    ) -> None:
        ratio = beta / self.D[i, at]
        pivot = alpha - beta * ratio
        P = V - ratio * self.P[i][:, at]
        zeta = -ratio * self.zeta[i, at] if self.steps > 1 else -self.zeta[i, at]
        # the pivot is p'(A + c I)p
        noise = self.eps * self.size[at] * self.A.space.dots(P, P).to(P)
        flat = pivot <= noise
        pivot = torch.where(flat, 1.0, pivot)
        weight = torch.where(flat, 0.0, zeta / pivot)
        self.X[i][:, at] += weight * P
        self.P[i][:, at], self.D[i, at], self.zeta[i, at] = P, pivot, zeta
        self.error[i, at] = torch.where(flat, self.error[i, at], beta_next * weight.abs())
        self.negative[i, at] = flat

    def worst(self) -> str:
        text = worst(self.error, self.target.expand_as(self.error))
        return f"residual {text}, {int(self.running.sum())} open"

    def report(self, vector: bool) -> Step:
        X = self.X[0] / (self.unit or 1.0)
        x = X.squeeze(1) if vector else X
        return Step(self.steps, x, self.error.max(0).values, self.products)

    def finish(self, b: Tensor, limit: int, interrupted: bool) -> MultishiftResult:
        A, X = self.A, self.X.div_(self.unit or 1.0)
        true = self._true_norms()
        statuses: list[tuple[Status, ...]] = []
        for i, shift in enumerate(self.C):
            converged = true[i] <= self.target
            row: list[Status] = [
                "converged" if good else "max steps" for good in converged.tolist()
            ]
            open_ = (~converged).nonzero().squeeze(1)
            if interrupted:
                row = ["interrupted" if status == "max steps" else status for status in row]
            elif open_.numel() and self.steps < limit:
                repair = cg(
                    Damped(A, shift),
                    self.B[:, open_],
                    x0=X[i][:, open_],
                    rtol=self.rtol,
                    atol=self.atol,
                    max_steps=limit - self.steps,
                )
                X[i][:, open_], true[i, open_] = repair.x, repair.residual_norms
                self.products += repair.products
                interrupted = "interrupted" in repair.status
                for column, status in zip(open_.tolist(), repair.status, strict=True):
                    row[column] = status
            statuses.append(tuple(row))
        return MultishiftResult(
            shifts=self.C,
            x=X.squeeze(2) if b.ndim == 1 else X,
            status=tuple(statuses),
            residual_norms=true,
            targets=self.target,
            history=torch.stack(self.history),
            steps=self.steps,
            products=self.products,
        )

    def _true_norms(self) -> Tensor:
        s, n, k = self.X.shape
        AX = (self.A @ self.X.transpose(0, 1).reshape(n, s * k)).reshape(n, s, k).transpose(0, 1)
        self.products += s * k
        residuals = (
            self.B - AX_i - shift * X_i for AX_i, X_i, shift in zip(AX, self.X, self.C, strict=True)
        )
        return torch.stack([checks.norms(R) for R in residuals])
