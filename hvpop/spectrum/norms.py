"""The Frobenius norm, estimated, and the spectral norm, found."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments, probes
from ..operators.arguments import Seed
from ..operators.crossing import working_dtype
from ..operators.measured import Measured
from . import spread
from .eigsh import eigsh
from .known import Known
from .results import Estimate
from .sampling import Band, History, Sampling, mean, student
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
        As for `trace`; a probe costs three products up to ``2^20`` entries, and beyond one.

    Returns
    -------
    Estimate
        The interval is Student's t for the logarithm of what is outside of the sketch.

    Notes
    -----
    Memory: up to ``2^20`` entries the sketch grows, by ``4/3`` vectors of ``n`` numbers a product;
    beyond it is of 8 vectors, and as many more while it is made.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Dense
    >>> from hvpop.spectrum import frobenius_norm
    >>> round(frobenius_norm(Dense(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))).value, 4)
    5.0
    """
    A = arguments.operator("frobenius_norm", A).linearize()
    kind = _Frobenius if max(A.shape) <= _GROWS else _Large
    task: Sampling[Any] = kind(A, rtol, block, seed)
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
        return _root(inside, mean(space.dots(APG, APG).cpu()))


@dataclass(frozen=True)
class _State:
    Q: Tensor  # (m, r), an orthonormal basis of a sketch of the range
    inside: Tensor  # (), |Q' A|_F^2
    outside: Tensor  # (N,), samples of the rest, float64 on the host like `inside`
    products: int = 0
    history: History = ()


class _Large(Sampling[_State]):
    """Keeps a small sketch, which holds what would make samples vary most: eigenvalues far out.

    ``|A|_F^2 = |Q' A|_F^2 + E |(I - Q Q') A g|^2``, where the latter takes a product and reads ``Q`` once.
    """

    name, unit, state_type = "frobenius_norm", 1, _State
    least = 32

    def start(self) -> _State:
        none = torch.empty(0, dtype=torch.float64)
        return _State(self.A.T.space.empty(0), none.sum(), none)

    def advance(self, state: _State, left: int) -> _State:
        sketch = state.products == 0 and left >= 4 * _SKETCH
        return self.noted(self._sketched(state) if sketch else self._sampled(state, left))

    def _sketched(self, state: _State) -> _State:
        space, A = self.A.T.space, self.source
        Y = space.empty(_SKETCH)
        for i in range(_SKETCH):  # one by one: a block product takes the memory of many vectors
            Omega = probes.signs(self.space, 1, self.seed, self.name, "sketch", i)
            Y[:, i : i + 1] = A @ Omega
        Q, _ = space.qr(Y)
        inside = sum(
            (self.space.norms(A.T @ q[:, None]).cpu() ** 2 for q in Q.T), torch.zeros(1).double()
        )
        return replace(state, Q=Q, inside=inside.sum(), products=2 * _SKETCH)

    def _sampled(self, state: _State, left: int) -> _State:
        space = self.A.T.space
        Y = self.source @ self.drawn(probes.signs, self.space, state, left)
        rest = space.dots(Y, Y) - space.inner(state.Q, Y).square().sum(0)
        outside = torch.cat([state.outside, rest.clamp_min(0.0).cpu()])
        return replace(state, outside=outside, products=state.products + Y.shape[1])

    def samples(self, state: _State) -> int:
        return state.outside.shape[0]

    def read(self, state: _State) -> Band:
        if not self.samples(state):
            return student(state.inside.sqrt(), state.inside, 0)
        return _root(state.inside, mean(state.outside))


_SKETCH = 8  # vectors, whose inner products with each sample cost less than its product
_GROWS = 1 << 20  # entries up to which vectors are short enough to keep as many as help


def _root(inside: Tensor, outside: Band) -> Band:
    """The band of ``(inside + outside)^(1/2)``."""
    tiny = torch.finfo(torch.float64).tiny
    value = (inside + outside.value).sqrt()
    # Squares are skew; the logarithm of their mean is less so.
    half = outside.high - outside.value
    factor = (half / outside.value.clamp_min(tiny)).exp()
    low, high = inside + outside.value / factor, inside + outside.value * factor
    error = outside.standard_error * 0.5 / value.clamp_min(tiny)
    return Band(value, error, low.sqrt(), high.nan_to_num().sqrt())


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
    A = arguments.operator("spectral_norm", A).linearize()
    seed = arguments.seed("spectral_norm", seed)
    arguments.positive("spectral_norm", rtol=rtol)
    source = Measured("spectral_norm", A)
    S, cost = (source, 1) if A.symmetric else (source.T @ source, 2)
    arguments.required("spectral_norm", cost, max_products=max_products)
    if data_error:
        spread.required(
            "spectral_norm", arguments.symmetric("spectral_norm with data_error=True", A)
        )
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
