"""The Frobenius norm, estimated, and the spectral norm, found."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.arguments import Seed
from ..operators.crossing import working_dtype
from ..operators.measured import Measured
from . import operand, spread
from .eigsh import eigsh
from .known import Known
from .results import Estimate
from .sampling import Band, mean
from .sketched import SplitSampling, SplitState


def frobenius_norm(
    A: LinearOperator,
    *,
    rtol: float | None = 0.02,
    max_products: int = 400,
    block: int | None = None,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """The Frobenius norm of an operator ``(m, n)``, symmetric or not.

    ``|A|_F^2 = |A Q|_F^2 + E |A (I - Q Q') g|^2``: exact on a sketch ``Q`` of the row space, sampled
    outside of it, as Hutch++ does for the trace (Meyer, Musco, Musco and Woodruff 2021). An operator
    that is not symmetric needs products with ``A.T``, too.

    Parameters
    ----------
    A, rtol, max_products, block, seed, progress, checkpoint
        As for `trace`; a probe costs three products.

    Returns
    -------
    Estimate
        The interval is Student's t for the logarithm of what is outside of the sketch.

    Notes
    -----
    Memory: the sketch keeps ``4/3`` vectors of ``n`` numbers a product.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Dense
    >>> from hvpop.spectrum import frobenius_norm
    >>> round(frobenius_norm(Dense(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))).value, 4)
    5.0
    """
    task = _Frobenius(operand.operator("frobenius_norm", A), rtol, block, seed)
    return task.estimate(max_products, progress, checkpoint)


class _Frobenius(SplitSampling):
    name = "frobenius_norm"

    def hopeless(self) -> bool:
        # products with the transpose tell nothing of what is left: one cannot change one's mind
        tight = self.rtol is not None and self.rtol < 0.01
        large = self.order > 2 * self.unit * self.least
        return super().hopeless() or (not self.A.symmetric and (tight or not large))

    def of_matrix(self, known: Known) -> Tensor:
        space = self.space if self.wide else self.A.T.space
        part = space.norms(known.AQ).square().sum().sqrt().cpu()
        extrapolated: Tensor = part * (self.order / max(1, known.count)) ** 0.5
        return extrapolated

    def read(self, state: SplitState) -> Band:
        space = self.A.T.space
        inside = space.dots(state.split.Z, state.split.Z).sum().cpu()
        APG = state.split.outside(self.space)[1]
        outside = mean(space.dots(APG, APG).cpu())
        value = (inside + outside.value).sqrt()
        slope = 0.5 / value.clamp_min(torch.finfo(torch.float64).tiny)
        # Squares are skew; the logarithm of their mean is less so.
        half = outside.high - outside.value
        factor = (half / outside.value.clamp_min(torch.finfo(torch.float64).tiny)).exp()
        low, high = inside + outside.value / factor, inside + outside.value * factor
        return Band(value, outside.standard_error * slope, low.sqrt(), high.nan_to_num().sqrt())


def spectral_norm(
    A: LinearOperator,
    *,
    rtol: float = 1e-3,
    max_products: int = 400,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    data_error: bool = False,
) -> Estimate:
    """The largest singular value of an operator ``(m, n)``: for a symmetric one, the largest |lambda|.

    By `eigsh` on ``A``, or on ``A' A`` if ``A`` is not symmetric.

    Parameters
    ----------
    rtol : float
        The residual, relative to the norm; the error is of the order of its square over the gap.
    A, max_products, seed, progress, checkpoint
        As for `eigsh`; a product with ``A.T`` counts as one.
    data_error : bool
        As for `eigsh`; for a symmetric operator.

    Returns
    -------
    Estimate
        Nothing here is sampled: `value` is a lower bound of the norm up to rounding, the interval
        from `low` to `high`, which allows for rounding, holds a singular value, and `standard_error` is the residual.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Dense
    >>> from hvpop.spectrum import spectral_norm
    >>> round(spectral_norm(Dense(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))).value, 4)
    4.0
    """
    A = operand.operator("spectral_norm", A)
    seed = arguments.seed("spectral_norm", seed)
    arguments.positive("spectral_norm", rtol=rtol)
    source = Measured("spectral_norm", A)
    S, cost = (source, 1) if A.symmetric else (source.T @ source, 2)
    arguments.required("spectral_norm", cost, max_products=max_products)
    if data_error:
        spread.required("spectral_norm", operand.symmetric("spectral_norm with data_error=True", A))
    found = eigsh(
        S, 1, "LM", rtol=rtol, max_products=max_products // cost, seed=seed, progress=progress,
        checkpoint=checkpoint,
    )  # fmt: skip
    if data_error:
        found = spread.of_eigenvalues("spectral_norm", A, found)
    theta, residual = found.eigenvalues[0].abs().item(), found.residuals[0].item()

    def norm(eigenvalue: float) -> float:
        return float(source.unit * eigenvalue ** (1 / cost))

    rounding = 10 * torch.finfo(working_dtype(A.torch_dtype)).eps * theta
    value, residual_of_norm = norm(theta), norm(theta + residual) - norm(theta)
    low, high = norm(theta - rounding), norm(theta + residual + rounding)
    history = tuple(
        (cost * products, value, norm(theta + worst) - value) for products, worst in found.history
    )
    data = None if found.data_errors is None else found.data_errors[0].item()
    return Estimate(
        value, residual_of_norm, low, high, cost * found.products, found.status, history, data
    )
