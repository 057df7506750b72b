"""The log-determinant of a positive definite operator, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.arguments import Seed
from .quadrature import Block, Measure, Quadrature, Recurrences
from .results import Estimate, Status
from .sampling import Band, History
from .spectral import SpectralSampling


def logdet(
    A: LinearOperator,
    *,
    rtol: float | None = 0.02,
    max_products: int = 4000,
    block: int | None = None,
    steps: int = 200,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """``log det A = tr log A`` of a symmetric positive definite operator.

    Each probe runs Lanczos until two quadratures of the logarithm have met, or for ``steps`` steps
    (Ubaru, Chen and Saad 2017): Gauss's, which is never too small, and Gauss and Radau's with a node
    at the rounding of the products, which is never too large (Golub and Meurant 2010). The gap between
    them is in the interval. A well damped operator needs few steps, about the square root of its
    condition number.

    Where ``max_products`` is ``n`` or more, the first probes share one space, which is followed to its
    end, the exact value, if that is fewer products than the estimate would take; it keeps a vector a
    product.

    Parameters
    ----------
    A : LinearOperator
        Symmetric and positive definite.
    steps : int
        Lanczos steps of a probe at most.
    rtol, max_products, block, seed, progress, checkpoint
        As for `trace`; a probe costs a product a step, and ``block`` probes go side by side.

    Returns
    -------
    Estimate
        ``status`` is "converged", "max products", "interrupted" or "low end unresolved": most of the
        interval, or all below the value, is open because small eigenvalues may be there that the
        steps have not resolved; `low` is then that of a spectrum that ends at the rounding of the products,
        or ``-inf`` if eigenvalues are seen there. Damp more, allow more ``steps``, or take float64.

    Raises
    ------
    ValueError
        If ``A`` is seen not to be positive definite.

    Notes
    -----
    Memory: four vectors of ``n`` numbers for each probe of a block, that of a product included; a vector a
    product on top where the answer becomes exact.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.spectrum import logdet
    >>> A = Diagonal(torch.linspace(1, 2, 500, dtype=torch.float64))
    >>> found = logdet(A)
    >>> found.low < A.d.log().sum().item() < found.high, found.status
    (True, 'converged')
    """
    task = _LogDet(arguments.symmetric("logdet", A).linearize(), rtol, block, seed)
    arguments.counts("logdet", steps=steps)
    task.steps = min(steps, A.shape[0])
    return task.estimate(max_products, progress, checkpoint)


@dataclass(frozen=True)
class _State:
    quadrature: Quadrature
    above: Tensor  # (2, N), a probe's forms of the logarithm and of its square, by Gauss ...
    below: Tensor  # (2, N), ... and by Gauss and Radau, -inf where nothing can be said
    rounding: Tensor  # (N,), what the rounding of the products may do to the logarithm
    history: History = ()

    @property
    def products(self) -> int:
        return self.quadrature.products

    @property
    def gap(self) -> float:
        """What the quadratures leave open of the form of the logarithm."""
        return float((self.above[0] - self.below[0]).mean())


class _LogDet(SpectralSampling[_State]):
    name, unit, state_type = "logdet", 1, _State
    steps: int

    def start(self) -> _State:
        none = torch.empty(2, 0, dtype=torch.float64)
        return _State(Quadrature.empty(), none, none, none[0])

    def length(self, state: _State) -> int:
        return max(1, state.quadrature.steps)

    def advance(self, state: _State, left: int) -> _State:
        state = replace(state, quadrature=self.stepped(state, left))
        group = state.quadrature.group
        assert group is not None
        ends = not self.completes(state)
        spent = ends and left < 2 * group.current.shape[1]
        long = ends and group.steps >= self.steps
        if not (spent or long or group.complete or group.steps % _every(group) == 0):
            return state
        finished = self._finished(state)
        if spent and state.history and not self._settled(finished):  # these would tell less
            return self.noted(replace(state, quadrature=replace(state.quadrature, group=None)))
        if group.complete or spent or long or self._ends(finished):
            return self.noted(finished)
        return state

    def _finished(self, state: _State) -> _State:
        """With the group at work among the finished ones; alone, if it knows all of the spectrum."""
        group = state.quadrature.group
        assert group is not None
        gauss, quadrature = group.measure(), state.quadrature.finished()
        if group.complete:
            whole = (quadrature.nodes, quadrature.weights)
            bounds = self._bounds(whole, whole)
        else:
            new = self._bounds(gauss, group.measure(_FLOOR * float(gauss[0].abs().max())))
            old = (state.above, state.below, state.rounding)
            bounds = [torch.cat(pair, -1) for pair in zip(old, new, strict=True)]
        return _State(quadrature, bounds[0], bounds[1], bounds[2], state.history)

    def _ends(self, finished: _State) -> bool:
        """Whether more steps of the last probes are worth less than other probes, or nothing."""
        if not math.isfinite(finished.gap):
            return True
        if not self._settled(finished):
            return False
        if not self.affordable or finished.history:
            return True
        band = self.judged(finished)
        limit = 0.0 if self.rtol is None else self.rtol * abs(self.restored(band).value.item())
        if band.error() <= limit:
            return True
        count, products = self.samples(finished), finished.products
        if limit == 0.0 or not math.isfinite(band.error()):
            return False
        rounds = math.ceil(1.1 * count / self.block * (min(band.error() / limit, 1e100) ** 2 - 1))
        return products + rounds * self.block * finished.quadrature.steps <= int(self.order)

    def _bounds(self, gauss: Measure, radau: Measure) -> list[Tensor]:
        smallest = self._rounding(gauss)
        nodes, weights = gauss
        mass = weights > torch.finfo(torch.float64).tiny
        if (nodes[mass] <= -smallest).any():
            raise ValueError(
                f"logdet expects a positive definite operator, but {self.A!r} has an eigenvalue at or "
                f"below {nodes[mass].min().item() * self.source.unit:.2e}; "
                "add damping: A + c * Identity.like(A)"
            )
        above = _forms(nodes, weights, smallest)
        # the basis is orthonormal to a few roundings, and as far the nodes may be from eigenvalues
        rounding = 0.4 * smallest * (weights / nodes.clamp_min(smallest)).sum(0)
        below = _forms(*radau, _FLOOR * float(nodes.abs().max()))
        below[0] = torch.minimum(below[0], above[0])
        below[0, (mass & (nodes <= smallest)).any(0)] = -torch.inf
        return [above, below, rounding]

    def _settled(self, state: _State) -> bool:
        """Whether what the quadratures leave open is little beside what the probes do."""
        allowed = 0.05 * (self.rtol or 0.0) * abs(float(state.above[0].mean()))
        return state.gap <= max(self._deviation(state.above) / 25, allowed)

    def _deviation(self, forms: Tensor) -> float:
        """The standard deviation of a form over the sphere, by the trace of the logarithm's square.

        It is far sharper than the spread of a few probes, which an end that depends on it would bias.
        """
        mean, square = forms.mean(1).tolist()
        n = self.A.shape[0]
        return math.sqrt(max(2 / (n + 2) * (square - mean**2), 0.0)) if mean > -math.inf else 0.0

    def _rounding(self, measure: Measure) -> float:
        """Ten roundings of the largest eigenvalue: what is smaller may be anything, even negative."""
        return 10 * torch.finfo(self.A.torch_dtype).eps * float(measure[0].abs().max())

    def samples(self, state: _State) -> int:
        return state.above.shape[1]

    def read(self, state: _State) -> Band:
        if state.quadrature.group is not None and self.samples(state) == 0:
            state = self._finished(state)
        n, count = self.A.shape[0], self.samples(state)
        deviations = [self._deviation(forms) for forms in (state.above, state.below)]
        error = 0.0 if state.quadrature.exact else max(deviations) / count**0.5
        value, rounding = state.above[0].mean(), state.rounding.mean()
        # the variance is known, but a form of few probes is skew: Student's factor allows for that
        half = float(stdtrit(max(1, count - 1), 0.975)) * error + rounding
        low, high = value - state.gap - half, value + half
        return Band(n * value, n * torch.full_like(value, error), n * low, n * high)

    def rounded(self, band: Band) -> Band:
        return band  # has it already: it is that of the eigenvalues, not of their logarithms

    def restored(self, band: Band) -> Band:
        shift = self.A.shape[0] * math.log(self.source.unit)
        low, value, high = (part + shift for part in (band.low, band.value, band.high))
        return Band(value, band.standard_error, low, high)

    def measures(self, state: _State) -> tuple[float, float]:
        band = self.band(state)
        return band.size(), band.error()

    def exhausted(self, state: _State) -> bool:
        return state.quadrature.exact

    def verdict(self, state: _State) -> Status | None:
        if not state.history:
            return None
        if self.exhausted(state):
            _, value, error = state.history[-1]
            known = error <= max((self.rtol or 0.0) * value, self.order * _EXACT)
            return "converged" if known else "low end unresolved"
        _, value, _ = state.history[-1]
        if self.rtol is not None and self.A.shape[0] * state.gap / 2 > self.rtol * value:
            return "low end unresolved"  # whatever the number of probes of so many steps is
        return super().verdict(state)

    def named(self, state: _State, status: Status) -> Status:
        return "low end unresolved" if status == "max products" and self._open(state) else status

    def _open(self, state: _State) -> bool:
        """Whether the low end of the spectrum is most of the interval."""
        band = self.read(state)
        return bool(band.value - band.low > 3 * (band.high - band.value))

    def report(self, state: _State) -> str:
        group = state.quadrature.group
        step = "" if group is None else f", step {group.steps}"
        return (super().report(state) if state.history else "first probes") + step


_FLOOR = torch.finfo(torch.float64).eps  # no eigenvalue is smaller, in units of the largest
_EXACT = 1e-3  # to which all eigenvalues must tell their logarithms at least


def _every(group: Recurrences | Block) -> int:
    """Steps between two looks at the quadrature, which takes all of a shared space apart."""
    return max(4, 2 ** (group.steps.bit_length() - 3)) if isinstance(group, Block) else 4


def _forms(nodes: Tensor, weights: Tensor, smallest: float) -> Tensor:
    logs = nodes.clamp_min(smallest).log()
    return torch.stack([(weights * logs).sum(0), (weights * logs**2).sum(0)])
