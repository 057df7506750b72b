"""The step of a trust-region Newton method, by truncated conjugate gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments
from . import checks
from .progress import Bar
from .results import Callback, SteihaugResult, Step, TrustStatus


def steihaug(
    A: LinearOperator,
    g: Tensor,
    radius: float,
    *,
    preconditioner: LinearOperator | None = None,
    rtol: float = 0.1,
    atol: float = 0.0,
    max_steps: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> SteihaugResult:
    """Minimise ``g's + s'As / 2`` within ``|s| <= radius``, approximately.

    Conjugate gradients from ``s = 0`` that follow the direction at hand to the boundary as soon as a
    step would leave the region or the direction has no positive curvature. The step is never worse
    than the best multiple of ``-g`` (of ``-Mg`` with a preconditioner ``M``), whatever ``A``.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, order n; linearized here.
    g : Tensor
        The gradient, ``(n,)``.
    radius
        Positive. With a preconditioner ``M`` the length of s is ``sqrt(s' M^-1 s)``.
    rtol, atol
        Inside the region it stops when ``|g + A s| <= max(rtol * |g|, atol)``, by recurrence: a
        trust-region method needs no more. For superlinear convergence let ``rtol`` fall with ``|g|``.
    max_steps
        n by default.
    preconditioner, callback, progress
        As in `cg`.

    Returns
    -------
    SteihaugResult
        "converged" (inside), "boundary", "negative curvature" (on the boundary, with the unit
        `direction` ``d``, ``d'Ad <= 0``), "max steps" or "interrupted".

    Notes
    -----
    T. Steihaug (1983); the norms in the preconditioner's metric as in A. R. Conn, N. I. M. Gould,
    P. L. Toint (2000), algorithm 7.5.1. One product per step and no other; five vectors.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.solvers import steihaug
    >>> A = Diagonal(torch.tensor([1.0, -1.0], dtype=torch.float64))
    >>> g = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> result = steihaug(A, g, 2.0)
    >>> result.step.round(decimals=12), result.status, round(result.decrease, 12)
    (tensor([ 0., -2.], dtype=torch.float64), 'negative curvature', 4.0)
    """
    checks.symmetric("steihaug", A, "the model s'As sees only its symmetric part")
    checks.limits("steihaug", rtol, atol, max_steps)
    if isinstance(g, Tensor) and g.ndim != 1:
        raise ValueError(
            f"steihaug expects one gradient of shape ({A.shape[0]},), got {tuple(g.shape)}"
        )
    r = checks.columns("steihaug", A, g, "g").squeeze(1).clone()
    M = checks.preconditioner("steihaug", A, preconditioner)
    arguments.positive("steihaug", radius=radius)
    A = A.linearize()
    limit = A.shape[0] if max_steps is None else max_steps

    # solved in units of the gradient's own entries, so that no square over- or underflows
    size = float(checks.sizes(r.unsqueeze(1)))
    r, radius, atol = r / size, radius / size, atol / size
    g = r.clone()
    s = torch.zeros_like(r)
    z, rho = _precondition(A, M, r)
    p = -z
    norm, ss, sp, pp = 0.0, 0.0, 0.0, rho  # in the metric of the region
    history = [_length(r)]
    target = max(rtol * history[0], atol)
    status: TrustStatus = "max steps"
    direction, steps = None, 0
    bar = Bar("steihaug", progress)
    try:
        while history[-1] > target and steps < limit:
            Ap: Tensor = A @ p
            steps += 1
            curvature = _dot(A, p, Ap)
            if not math.isfinite(curvature):
                raise FloatingPointError(
                    f"steihaug({A!r}): product {steps} is not finite; look for non-finite entries in the "
                    "model, the data or the damping"
                )
            alpha = rho / curvature if curvature > 0 else math.inf
            tau = _to_boundary(norm, sp, pp, radius)
            if alpha >= tau:
                s, r, norm = s + tau * p, r + tau * Ap, radius
                history.append(_length(r))
                status = "boundary" if curvature > 0 else "negative curvature"
                direction = None if curvature > 0 else p / _length(p)
                break
            s, r = s + alpha * p, r + alpha * Ap
            z, rho_next = _precondition(A, M, r)
            beta, rho = rho_next / rho, rho_next
            ss, sp = ss + alpha * (2 * sp + alpha * pp), beta * (sp + alpha * pp) - _dot(A, s, r)
            norm = math.sqrt(ss)
            p, pp = beta * p - z, rho + beta**2 * pp
            history.append(_length(r))
            bar.update(lambda: f"residual {history[-1] * size:.2e} (target {target * size:.2e})")
            at = Step(steps, s * size, checks.norms(r.unsqueeze(1)) * size, steps)
            if checks.stopped("steihaug", callback, lambda at=at: at):  # type: ignore[misc]
                status = "interrupted"
                break
        else:
            status = "converged" if history[-1] <= target else "max steps"
    except KeyboardInterrupt:
        r, status = g + A @ s, "interrupted"  # s and r may be one step apart
    finally:
        bar.close()
    length = _length(s) or 1.0
    return SteihaugResult(
        step=s * size,
        status=status,
        decrease=-0.5 * _dot(A, s / length, g + r) * (length * size) * size,
        norm=norm * size,
        residual_norm=_length(r) * size,
        history=torch.tensor(history, dtype=torch.float64) * size,
        steps=steps,
        products=steps,
        direction=direction,
    )


def _dot(A: LinearOperator, x: Tensor, y: Tensor) -> float:
    """In float64, which has the squares of all that float32 has."""
    return float(A.space.dots(x.unsqueeze(1), y.unsqueeze(1)))


def _length(v: Tensor) -> float:
    return float(checks.norms(v.unsqueeze(1)))


def _to_boundary(norm: float, sp: float, pp: float, radius: float) -> float:
    """The positive ``tau`` with ``|s + tau p| = radius``, without cancellation or overflow."""
    reach = math.sqrt(max(radius - norm, 0.0)) * math.sqrt(radius + norm)  # squared: radius^2 - ss
    root = math.hypot(sp, math.sqrt(pp) * reach)
    return reach * (reach / (sp + root)) if sp > 0 else (root - sp) / pp


def _precondition(A: LinearOperator, M: LinearOperator | None, r: Tensor) -> tuple[Tensor, float]:
    z: Tensor = r if M is None else M @ r
    rho = _dot(A, r, z)
    if M is not None:
        forms = torch.tensor([rho], dtype=torch.float64)
        checks.positive_form("steihaug", A, M, r.double().unsqueeze(1).cpu(), forms)
    return z, rho
