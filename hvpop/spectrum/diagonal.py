"""The diagonal, by Hutchinson and XDiag, with an error for every entry."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..operators import LinearOperator, probes
from ..operators.arguments import Seed
from .known import Known
from .results import DiagonalEstimate
from .sampling import Band, C, Completing, History, Sampling, chosen, sample, student
from .sketched import LeaveOutSampling, LeaveOutState

DiagonalMethod = Literal["hutchinson", "xdiag"]


def diagonal(
    A: LinearOperator,
    *,
    method: DiagonalMethod | None = None,
    rtol: float | None = 0.1,
    max_products: int = 400,
    block: int | None = None,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> DiagonalEstimate:
    """The diagonal of a square operator, estimated from products with random signs.

    Parameters
    ----------
    A : LinearOperator
        Square; symmetric for "xdiag".
    method : {"xdiag", "hutchinson"}, optional
        Default: "xdiag" up to ``2^20`` entries, and beyond "hutchinson", which keeps no vectors.
        "hutchinson" averages ``z * (A z)`` over random signs (Bekas, Kokiopoulou and Saad 2007) and
        takes a block, its product, and six vectors. "xdiag" takes the diagonal of a low-rank sketch exactly and samples the
        rest, leaving every probe out in turn (Epperly, Tropp and Webber 2024); it is far better
        where the eigenvalues decay, and keeps ``3/2`` vectors a product.
    rtol : float, optional
        Sample until the half-widths of the 95 % intervals, as a vector, have at most ``rtol`` times
        the norm of the diagonal; None spends the budget.
    max_products, block, seed, progress, checkpoint
        As for `trace`.

    Returns
    -------
    DiagonalEstimate
        Tensors of shape ``(n,)``; each interval covers its entry in 95 % of runs.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.spectrum import diagonal
    >>> A = Diagonal(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> diagonal(A).value.round(decimals=9)
    tensor([1., 2., 3.], dtype=torch.float64)
    """
    methods: dict[str, type[Sampling[Any]]] = {"xdiag": _XDiag, "hutchinson": _Hutchinson}
    task = chosen("diagonal", A, method, methods)(A.linearize(), rtol, block, seed)
    state, status = sample(task, max_products, progress, checkpoint)
    band = task.band(state)
    return DiagonalEstimate(
        band.value, band.standard_error, band.low, band.high, state.products, status, state.history
    )


@dataclass(frozen=True)
class _Moments:
    mean: Tensor  # (n,)
    deviation: Tensor  # (n,), the sum of squared deviations from it
    known: Known
    count: int = 0
    products: int = 0
    history: History = ()


class _Diagonal(Completing[C]):
    def of_matrix(self, known: Known) -> Tensor:
        return (known.Q * known.AQ).sum(1)


class _Hutchinson(_Diagonal[_Moments]):
    name, unit, state_type = "diagonal by hutchinson", 1, _Moments
    vectors = (*Completing.vectors, "mean", "deviation")

    def start(self) -> _Moments:
        zero = self.space.zeros(1)[:, 0]
        return _Moments(zero, zero, self.nothing())

    def sampled(self, state: _Moments, left: int) -> _Moments:
        V = self.drawn(probes.signs, self.space, state, left)
        count = V.shape[1]
        new = V * (self.source @ V)
        # Mean and deviation of a union of two samples (Chan, Golub and LeVeque 1983).
        total, mean = state.count + count, new.mean(1)
        shift = mean - state.mean
        deviation = state.deviation + ((new - mean[:, None]) ** 2).sum(1)
        deviation = deviation + shift**2 * (state.count * count / total)
        mean = state.mean + shift * (count / total)
        products = state.products + count
        return replace(state, mean=mean, deviation=deviation, count=total, products=products)

    def samples(self, state: _Moments) -> int:
        return state.count

    def read(self, state: _Moments) -> Band:
        count = state.count
        variance = state.deviation / max(1, count * (count - 1))
        return student(state.mean, variance.sqrt(), count)


class _XDiag(LeaveOutSampling, _Diagonal[LeaveOutState]):
    name, keep = "diagonal by xdiag", True

    draw = staticmethod(probes.signs)

    def read(self, state: LeaveOutState) -> Band:
        """The mean over i of the sketch's diagonal without probe i, plus a sample by probe i.

        The variance is that of `trace` by XTrace, entry by entry. With ``u_i = Q s_i`` and
        ``e_i = rho_i omega_i - Z s_i`` the sample is ``diag(Q Z') + u_i * e_i``, and what probe j in
        the sketch does to it is ``(u_j - g u_i) * (Z s_j + g e_i) / (1 - g^2)``, ``g = s_i' s_j``.
        """
        sketch = state.sketch
        S, rho = sketch.directions()
        N = S.shape[0]
        G = (S.T @ S).to(sketch.Q)
        U, ZS = sketch.Q @ S.to(sketch.Q), sketch.Z @ S.to(sketch.Q)
        E = rho.to(sketch.Q) * sketch.Omega - ZS
        samples = (sketch.Q * sketch.Z).sum(1, keepdim=True) + U * E
        value = samples.mean(1)
        if N < 2:
            return student(value, value, N)
        covariance = torch.zeros_like(value)
        for i in range(N - 1):
            g = G[i, i + 1 :]
            sine = (1 - g * g).clamp_min(torch.finfo(g.dtype).eps)
            u, z, e = U[:, i, None], ZS[:, i, None], E[:, i, None]
            Uj, Zj, Ej = U[:, i + 1 :], ZS[:, i + 1 :], E[:, i + 1 :]
            of_j_on_i, of_i_on_j = (Uj - g * u) * (Zj + g * e), (u - g * Uj) * (z + g * Ej)
            covariance += 2 * (of_j_on_i * of_i_on_j / sine**2).sum(1)
        covariance = (covariance / (N * (N - 1))).nan_to_num(0.0).clamp_min(0.0)
        return student(value, (samples.var(1) / N + covariance).sqrt(), N)
