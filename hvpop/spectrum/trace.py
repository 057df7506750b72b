"""The trace, by Hutchinson, Hutch++ and XTrace, each with an error that means what it says."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..operators import LinearOperator, probes
from ..operators.arguments import Seed
from . import spread
from .known import Known
from .results import Estimate
from .sampling import Band, C, Completing, History, Sampling, chosen, mean, student
from .sketch import LeaveOut
from .sketched import LeaveOutSampling, LeaveOutState, SplitSampling, SplitState

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]


def trace(
    A: LinearOperator,
    *,
    method: TraceMethod | None = None,
    rtol: float | None = 0.02,
    max_products: int = 400,
    block: int | None = None,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    data_error: bool = False,
) -> Estimate:
    """The trace of a square operator, estimated from products with random vectors.

    Parameters
    ----------
    A : LinearOperator
        Square; symmetric for "hutch++" and "xtrace".
    method : {"xtrace", "hutch++", "hutchinson"}, optional
        Default: "xtrace" up to ``2^20`` entries, and beyond "hutchinson", which keeps no vectors.
        "hutchinson" averages ``z' A z`` over random signs (Girard 1987, Hutchinson 1990); its error
        falls as the square root of the products. "hutch++" takes the trace exactly on a sketch of
        the range and samples the rest (Meyer, Musco, Musco and Woodruff 2021). "xtrace" makes every
        vector serve for both (Epperly, Tropp and Webber 2024). The last two are far better where
        the eigenvalues decay, and keep ``4/3`` and ``1`` vectors a product in memory.
    rtol : float, optional
        Sample until the half-width of the 95 % interval is at most ``rtol |trace|``; None spends
        the budget.
    max_products : int
        The budget. Never more than ``n`` are taken: where sampling would take as many, and the budget
        allows it, the rest of the matrix is multiplied out, and the answer exact.
    block : int, optional
        Probes a round; a round is one block product for "hutchinson", two for the others. Default 16,
        fewer where so many vectors are more than ``2^22`` numbers.
    seed : int or torch.Generator
        Equal ones give equal numbers.
    progress, checkpoint
        As for `eigsh`.
    data_error : bool
        Tell by the spread over batches (`LinearOperator.batch_forms`) how far the trace may be
        from that of the population the data were drawn from: `data_error`. Costs ``block`` probes (at
        least 4) beyond the budget, a product each, in one pass at the end; if those are too few to tell it
        from their own noise, it is too large. None after Ctrl-C.

    Returns
    -------
    Estimate
        ``status`` is "converged", "max products" or "interrupted". The interval is Student's t. The
        leave-one-out samples of XTrace share their sketch and are therefore correlated: their
        covariance is estimated, too, without bias, from leaving out pairs of probes.

    Raises
    ------
    FloatingPointError
        If a product is not finite.

    Notes
    -----
    Memory: "hutchinson" takes a block and its product, at most ``block + 6`` vectors with the default
    block from a million entries on; the other methods two vectors a probe on top.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.spectrum import trace
    >>> A = Diagonal(0.5 ** torch.arange(200, dtype=torch.float64))
    >>> found = trace(A, rtol=1e-3)
    >>> found.status, round(found.value, 2), found.products
    ('converged', 2.0, 32)
    """
    methods: dict[str, type[Sampling[Any]]] = {
        "xtrace": _XTrace,
        "hutch++": _HutchPlusPlus,
        "hutchinson": _Hutchinson,
    }
    task = chosen("trace", A, method, methods)(A.linearize(), rtol, block, seed)
    if data_error:
        spread.required("trace", task.A)
    found = task.estimate(max_products, progress, checkpoint)
    return spread.of_trace(task.A, found, task.block, task.seed) if data_error else found


@dataclass(frozen=True)
class _Samples:
    """Independent samples of a number or of one for every entry."""

    values: Tensor  # (N,), float64 on the host
    known: Known
    products: int = 0
    history: History = ()


class _Trace(Completing[C]):
    def of_matrix(self, known: Known) -> Tensor:
        part = self.space.dots(known.Q, known.AQ).sum().cpu()
        extrapolated: Tensor = part * (self.order / max(1, known.count))
        return extrapolated


class _Hutchinson(_Trace[_Samples]):
    name, unit, state_type = "trace by hutchinson", 1, _Samples
    least = 32  # their spread varies more than that of what a sketch leaves over

    def start(self) -> _Samples:
        return _Samples(torch.empty(0, dtype=torch.float64), self.nothing())

    def sampled(self, state: _Samples, left: int) -> _Samples:
        V = self.drawn(probes.signs, self.space, state, left)
        values = torch.cat([state.values, self.space.dots(V, self.source @ V).cpu()])
        return replace(state, values=values, products=state.products + V.shape[1])

    def samples(self, state: _Samples) -> int:
        return state.values.shape[0]

    def read(self, state: _Samples) -> Band:
        return mean(state.values)


class _HutchPlusPlus(SplitSampling, _Trace[SplitState]):
    name = "trace by hutch++"

    def read(self, state: SplitState) -> Band:
        split = state.split
        inside = self.space.dots(split.Q, split.Z).sum().cpu()
        PG, APG = split.outside(self.space)
        band = mean(self.space.dots(PG, APG).cpu())
        return Band(band.value + inside, band.standard_error, band.low + inside, band.high + inside)


class _XTrace(LeaveOutSampling, _Trace[LeaveOutState]):
    name = "trace by xtrace"

    draw = staticmethod(probes.sphere)

    def read(self, state: LeaveOutState) -> Band:
        """The mean of ``t_i``, the trace on the sketch without probe i, plus a sample by probe i.

        Given the other probes, ``t_i`` and ``t_j`` are correlated only through what each does to
        the sketch of the other: with ``t_ij``, probe i's sample when j is left out of its sketch,
        ``cov(t_i, t_j) = E (t_i - t_ij)(t_j - t_ji)``, because the rest has mean zero given either.
        A negative estimate of it is taken as zero.
        """
        one, two = _leave_out_traces(state.sketch, self.A.shape[0])
        N = one.shape[0]
        if N < 2:
            return student(one.mean(), one.mean(), N)
        effect = one - two  # (j, i): what probe j in the sketch does to sample i
        effect.fill_diagonal_(0.0)
        covariance = (effect * effect.T).sum() / (N * (N - 1))
        variance = one.var() / N + covariance.nan_to_num(0.0).clamp_min(0.0)
        return student(one.mean(), variance.sqrt(), N)


def _leave_out_traces(sketch: LeaveOut, n: int) -> tuple[Tensor, Tensor]:
    """``t_i``, ``(N,)``, and ``t_ij``, at ``[j, i]``, ``(N, N)``; ``O(N^3)`` on the host."""
    S, rho = sketch.directions()
    H, W, R = sketch.H, sketch.W, sketch.R
    N = R.shape[0]
    HW = H @ W
    G, K, C, D = S.T @ S, S.T @ H @ S, S.T @ W, S.T @ HW
    a, k, d = C.diagonal(), K.diagonal(), D.diagonal()
    outside = sketch.squares - (W * W).sum(0)  # |omega - Q Q' omega|^2
    form = sketch.quadratic - 2 * (W * R).sum(0) + (W * HW).sum(0) + 2 * a * rho
    # Without i, omega_i is projected by Q x with x = w_i - a_i s_i; probes on a sphere have a known
    # mean square in a subspace, so the length of what is left is known and divided out.
    lengths = (outside + a * a).clamp_min(torch.finfo(torch.float64).tiny)
    one = H.trace() - k + (n - N + 1) / lengths * (form - 2 * a * d + a * a * k)
    # Without i and j, x = w_i - alpha s_i - beta s_j; the cosine of s_i and s_j is G[j, i].
    sine = (1 - G * G).clamp_min(torch.finfo(torch.float64).eps)
    beta = (C - G * a) / sine
    alpha = a - G * beta
    lengths = (outside + a * a + beta**2 * sine).clamp_min(torch.finfo(torch.float64).tiny)
    lost = k + (k[:, None] - 2 * G * K + G * G * k) / sine
    forms = form + 2 * (alpha - a) * rho - 2 * alpha * d - 2 * beta * D
    forms = forms + alpha**2 * k + 2 * alpha * beta * K + beta**2 * k[:, None]
    return one, H.trace() - lost + (n - N + 2) / lengths * forms
