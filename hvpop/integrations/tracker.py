"""The curvature of a model that is being trained, measured now and then, warm from the last time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..curvature.kinds import matrix as kind_of
from ..operators import LinearOperator, arguments
from ..risk import EmpiricalRisk
from ..risk.losses import BatchLoss
from ..spectrum import Density, eigsh, spectral_density, trace
from ..spectrum.lanczos import Which

PREFIX = "curvature/"


class Tracker:
    """Largest eigenvalues and trace of a live operator, at each call as the model is then.

    Parameters
    ----------
    H : LinearOperator
        Symmetric and live, such as a `HessianOperator`.
    k, which
        Eigenvalues, as for `hvpop.spectrum.eigsh`.
    trace : bool
        Whether to estimate the trace, too.
    density_every : int, optional
        At every so manieth call the density of the spectrum is kept in `densities`.
    rtol : float
        Of the residuals and the trace: curves need no more than a percent.
    max_products : int
        The budget of each number.
    seed : int
        Of the random vectors, the same ones at every call: curves do not jitter by them.

    Attributes
    ----------
    history : list of (int, dict)
        The steps and what was found there.
    densities : list of (int, Density)
        As far as asked for.

    Notes
    -----
    Training goes on as if nothing had been measured, to the last bit: products leave parameters,
    buffers, gradients, modes and random states as they are. A search starts from the last one's
    eigenvectors, which takes a fraction of the products while the model changes slowly. Ctrl-C ends the
    training as it would without: a measurement that it cuts short is dropped.

    Memory: the ``k`` eigenvectors between calls; those of `eigsh` and `trace` during one.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator
    >>> from hvpop.integrations import Tracker
    >>> model, loss = torch.nn.Linear(2, 1, bias=False).double(), torch.nn.MSELoss()
    >>> x = torch.eye(2, dtype=torch.float64)
    >>> tracker = Tracker(HessianOperator(model, loss, [(x, x[:, :1])]))
    >>> found = tracker(step=0)
    >>> round(found["curvature/eigenvalue_1"], 6), round(found["curvature/trace"], 6)
    (1.0, 2.0)
    """

    def __init__(
        self,
        H: LinearOperator,
        *,
        k: int = 1,
        which: Which = "LA",
        trace: bool = True,
        density_every: int | None = None,
        rtol: float = 1e-2,
        max_products: int = 200,
        seed: int = 0,
    ) -> None:
        arguments.symmetric("Tracker", H, "take A.T @ A")
        arguments.counts("Tracker", k=k, max_products=max_products, density_every=density_every)
        arguments.positive("Tracker", rtol=rtol)
        self.H, self.k, self.which = H, min(k, H.shape[0]), which
        self.trace, self.density_every = trace, density_every
        self.rtol, self.max_products = rtol, max_products
        self.seed = arguments.seed("Tracker", seed)
        self.history: list[tuple[int, dict[str, float]]] = []
        self.densities: list[tuple[int, Density]] = []
        self._vectors: Tensor | None = None

    def __call__(self, step: int | None = None) -> dict[str, float]:
        """Measure now: names that begin with ``curvature/`` and numbers, largest eigenvalue first."""
        at = len(self.history) if step is None else step
        A = self.H.linearize()
        common: dict[str, Any] = {"max_products": self.max_products, "seed": self.seed}
        top = eigsh(A, self.k, self.which, v0=self._vectors, rtol=self.rtol, **common)
        _go_on(top.status)
        self._vectors = top.eigenvectors
        found = {
            f"{PREFIX}eigenvalue_{i}": value
            for i, value in enumerate(top.eigenvalues.flip(0).tolist(), 1)
        }
        found[f"{PREFIX}residual"] = top.residuals.max().item()
        products = top.products
        if self.trace:
            estimate = trace(A, rtol=self.rtol, **common)
            _go_on(estimate.status)
            found[f"{PREFIX}trace"] = estimate.value
            found[f"{PREFIX}trace_error"] = estimate.standard_error
            products += estimate.products
        if self.density_every is not None and len(self.history) % self.density_every == 0:
            density = spectral_density(A, **common)
            _go_on(density.status)
            self.densities.append((at, density))
            products += density.products
        found[f"{PREFIX}products"] = float(products)
        self.history.append((at, found))
        return found


class Measuring:
    """What callbacks share: their arguments, and the tracker that the first measurement makes."""

    def _begin(
        self, every: int, k: int, data: Any, matrix: str, params: Any, loss: BatchLoss, options: Any
    ) -> None:
        arguments.counts("CurvatureCallback", every=every, k=k)
        self.every, self.k, self.data, self.params = every, k, data, params
        self.loss, self.options = loss, options
        self._kind = kind_of(matrix)
        self.tracker: Tracker | None = None

    def _measured(self, model: nn.Module, step: int) -> dict[str, float]:
        if self.tracker is None:
            risk = EmpiricalRisk.from_batch_loss(model, self.loss, self.data, params=self.params)
            self.tracker = Tracker(self._kind.from_risk(risk), k=self.k, **self.options)
        return self.tracker(step)


def _go_on(status: str) -> None:
    """Ctrl-C is meant for the training: an estimate keeps what there is, and would swallow it."""
    if status == "interrupted":
        raise KeyboardInterrupt
