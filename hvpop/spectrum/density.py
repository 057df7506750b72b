"""The density of the whole spectrum, by stochastic Lanczos quadrature, with a confidence band."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from scipy.special import chdtri
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.arguments import Seed
from .quadrature import Quadrature
from .results import Density
from .sampling import Band, History, sample
from .spectral import SpectralSampling


def spectral_density(
    A: LinearOperator,
    *,
    steps: int = 64,
    width: float | None = None,
    rtol: float | None = None,
    max_products: int = 512,
    block: int | None = None,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Density:
    """How the eigenvalues of a symmetric operator are spread: a smooth density with its error.

    Parameters
    ----------
    A : LinearOperator
        Symmetric.
    steps : int
        Lanczos steps of a probe; they limit how narrow a feature can be seen.
    width : float, optional
        Standard deviation of the Gaussian that each eigenvalue is smoothed to. The default is the
        range of the spectrum over ``steps``, about what so many steps resolve.
    rtol : float, optional
        Sample until the area of the upper half of the band is at most this; the area under the
        density is one.
    max_products, block, seed, progress, checkpoint
        As for `trace`; a probe costs ``steps`` products, and ``block`` probes go side by side, by default
        8, fewer where so many vectors are more than ``2^22`` numbers. A budget of ``n`` without ``rtol``, or with one that would take as many, gives all eigenvalues, for
        ``n`` products and the memory of as many vectors.

    Returns
    -------
    Density
        At 600 points. Where the density is that of the smoothed spectrum, the band covers it in
        95 % of runs.

    Notes
    -----
    Lanczos from random unit vectors, whose Gauss quadratures are averaged (Lin, Saad and Yang 2016;
    Ghorbani, Krishnan and Xiao 2019). What a probe ``z`` sees at a point is the positive form
    ``z' g(A) z``. Its variance over the sphere is ``2 / (n + 2) (tr g^2 / n - (tr g / n)^2)``, which
    the same quadrature gives, far sharper than the spread of a few probes would; and the band is
    that of the scaled chi-square with this variance, because one eigenvalue alone is seen as a
    square of a normal number.

    Memory: four vectors of ``n`` numbers for each probe of a block, that of a product included.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.spectrum import spectral_density
    >>> A = Diagonal(torch.linspace(0, 1, 1000, dtype=torch.float64))
    >>> found = spectral_density(A)
    >>> middle = found.grid.sub(0.5).abs().argmin()
    >>> found.low[middle].item() < 1.0 < found.high[middle].item()
    True
    """
    A = arguments.symmetric("spectral_density", A).linearize()
    task = _Density(A, rtol, block, seed)
    arguments.counts("spectral_density", steps=steps)
    arguments.positive("spectral_density", width=width)
    task.steps, task.width = min(steps, A.shape[0]), width
    state, status = sample(task, max_products, progress, checkpoint)
    quadrature = task.complete(state)
    grid, width = task.grid(quadrature)
    unit = task.source.unit
    band = _band(quadrature, grid, width, A.shape[0]).scaled(1 / unit)
    return Density(
        unit * grid, band.value, band.standard_error, band.low, band.high, unit * quadrature.nodes,
        quadrature.weights, unit * width, A.shape[0], state.products, status,
    )  # fmt: skip


@dataclass(frozen=True)
class _State:
    quadrature: Quadrature
    history: History = ()

    @property
    def products(self) -> int:
        return self.quadrature.products


class _Density(SpectralSampling[_State]):
    name, unit, state_type, usual = "spectral_density", 1, _State, 8
    width: float | None

    def start(self) -> _State:
        return _State(Quadrature.empty())

    def length(self, state: _State) -> int:
        return self.steps

    def advance(self, state: _State, left: int) -> _State:
        state = replace(state, quadrature=self.stepped(state, left))
        group = state.quadrature.group
        assert group is not None
        if group.complete:
            return self.noted(replace(state, quadrature=state.quadrature.finished()))
        whole = self.completes(state)
        if group.steps < self.steps or (whole and self.rtol is None):
            return state
        finished = self.noted(replace(state, quadrature=state.quadrature.finished()))
        return finished if not whole or self._ends(finished) else state

    def _ends(self, finished: _State) -> bool:
        """Whether other probes are worth more than all of the spectrum, where that is at hand."""
        assert self.rtol is not None
        products, _, area = finished.history[-1]
        more = max(1.0, area / self.rtol) ** 2 - 1
        return bool(products * (1 + 1.3 * more) <= self.order)

    def complete(self, state: _State) -> Quadrature:
        """The finished probes; the unfinished ones, if there are no others."""
        none = state.quadrature.nodes.numel() == 0
        return state.quadrature.finished() if none else state.quadrature

    def grid(self, quadrature: Quadrature) -> tuple[Tensor, float]:
        """600 points over the spectrum and its smoothing, and the width of the latter."""
        nodes = quadrature.nodes[quadrature.weights > 1e-14]
        low, high = nodes.min().item(), nodes.max().item()
        size = max(abs(low), abs(high)) or 1.0
        spread = high - low if high - low > 1e-12 * size else 1e-3 * size
        width = spread / self.steps if self.width is None else self.width / self.source.unit
        return torch.linspace(low - 4 * width, high + 4 * width, 600, dtype=torch.float64), width

    def placed(self, state: _State) -> int:
        return state.quadrature.probes

    def samples(self, state: _State) -> int:
        return _ENOUGH if state.history else 0

    def exhausted(self, state: _State) -> bool:
        return state.quadrature.exact

    def read(self, state: _State) -> Band:
        quadrature = self.complete(state)
        return _band(quadrature, *self.grid(quadrature), self.A.shape[0])

    def noted(self, state: _State) -> _State:
        quadrature = self.complete(state)
        grid, width = self.grid(quadrature)
        band = _band(quadrature, grid, width, self.A.shape[0])
        area = torch.trapezoid((band.high - band.value).clamp_max(1 / width), grid).item()
        return replace(state, history=(*state.history, (state.products, 1.0, area)))

    def report(self, state: _State) -> str:
        group = state.quadrature.group
        step = "" if group is None else f", step {group.steps} of {self.steps}"
        error = f"error {state.history[-1][2]:.1e}" if state.history else "first probes"
        return error + step


_ENOUGH = 1000  # the variance is not judged from the spread of samples: any number will do


def _band(quadrature: Quadrature, grid: Tensor, width: float, n: int) -> Band:
    """The mean over the probes of the smoothed measures on the grid, and its chi-square band."""
    nodes, weights = quadrature.nodes, quadrature.weights
    count = nodes.shape[1]
    kernel = torch.exp(-(((grid[:, None] - nodes.reshape(-1)) / width) ** 2) / 2)
    kernel = kernel / (width * (2 * torch.pi) ** 0.5)
    value = kernel @ weights.reshape(-1) / count
    if quadrature.exact:
        return Band(value, torch.zeros_like(value), value, value)
    square = kernel**2 @ weights.reshape(-1) / count
    variance = 2 / (n + 2) * (square - value**2).clamp_min(0.0) / count
    # value ~ mean * chi2_d / d, with d such that its variance is the one above.
    tiny = torch.finfo(torch.float64).tiny
    d = (2 * value**2 / variance.clamp_min(tiny)).clamp(1.0, 1e12)
    low, high = (
        value * d / torch.tensor(chdtri(d.tolist(), tail).tolist(), dtype=torch.float64)
        for tail in (0.025, 0.975)
    )
    return Band(value, variance.sqrt(), low, high)
