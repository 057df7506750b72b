"""The log-determinant of a positive definite operator, by stochastic Lanczos quadrature."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments
from . import operand, probes
from .quadrature import Quadrature
from .results import Estimate
from .sampling import Band, History, Sampling, mean


def logdet(
    A: LinearOperator,
    *,
    rtol: float | None = 0.02,
    max_products: int = 4000,
    block: int = 16,
    steps: int = 200,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """``log det A = tr log A`` of a symmetric positive definite operator.

    Each probe runs Lanczos until its quadrature of the logarithm has settled, or for ``steps``
    steps; what is not settled then is added to the band (Ubaru, Chen and Saad 2017). A well damped
    operator needs few steps, about the square root of its condition number.

    Parameters
    ----------
    A : LinearOperator
        Symmetric and positive definite.
    steps : int
        Lanczos steps of a probe at most.
    rtol, max_products, block, seed, progress, checkpoint
        As for `trace`; a probe costs a product a step, and ``block`` probes go side by side.

    Raises
    ------
    ValueError
        If ``A`` is seen not to be positive definite.

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
    task = _LogDet(operand.symmetric("logdet", A), rtol, block, seed)
    arguments.counts("logdet", steps=steps)
    task.steps = min(steps, A.shape[0])
    return task.estimate(max_products, progress, checkpoint)


@dataclass(frozen=True)
class _State:
    quadrature: Quadrature
    values: Tensor  # (N,), of the finished probes
    open_ends: Tensor  # (N,), how far each quadrature may be from its limit
    history: History = ()

    @property
    def products(self) -> int:
        return self.quadrature.products


class _LogDet(Sampling[_State]):
    name, unit, state_type = "logdet", 1, _State
    steps: int

    def start(self) -> _State:
        none = torch.empty(0, dtype=torch.float64)
        return _State(Quadrature.empty(), none, none)

    def price(self, state: _State) -> int:
        group = state.quadrature.group
        if group is not None:
            return group.current.shape[1]
        # A new group is begun only if it can be finished, as far as the last one tells.
        return 1 if state.products == 0 else state.quadrature.nodes.shape[0] * min(2, self.block)

    def advance(self, state: _State, left: int) -> _State:
        n, expected = self.A.shape[0], max(1, state.quadrature.nodes.shape[0])
        affordable = max(1, left // expected)
        quadrature = state.quadrature.stepped(
            self.A, lambda: self.drawn(probes.gaussian, n, state, affordable)
        )
        group = quadrature.group
        assert group is not None
        state = replace(state, quadrature=quadrature)
        j = group.alpha.shape[0]
        spent = left < 2 * group.current.shape[1]
        if j % _EVERY and j < self.steps and not spent:
            return state
        values, open_ends = self._values(quadrature)
        spread = values.std() if values.shape[0] > 1 else 0.0
        tolerance = max(spread / 100, 1e-3 * (self.rtol or 0.0) * values.mean().abs())
        settled = open_ends.mean() <= tolerance
        if not settled and j < self.steps and not spent:
            return state
        state = replace(
            state,
            quadrature=quadrature.finished(),
            values=torch.cat([state.values, values]),
            open_ends=torch.cat([state.open_ends, open_ends]),
        )
        return self.noted(state)

    def _values(self, quadrature: Quadrature) -> tuple[Tensor, Tensor]:
        """``n`` times each probe's quadrature of the logarithm, and how it moved lately."""
        group = quadrature.group
        assert group is not None
        j = group.alpha.shape[0]
        sums = [self._sum(*group.measure(steps)) for steps in (j, max(1, j - _EVERY))]
        return sums[0], (sums[0] - sums[1]).abs() if j < self.A.shape[0] else 0 * sums[0]

    def _sum(self, nodes: Tensor, weights: Tensor) -> Tensor:
        mass = weights > torch.finfo(torch.float64).tiny
        if (nodes[mass] <= 0).any():
            raise ValueError(
                f"logdet expects a positive definite operator, but {self.A!r} has an eigenvalue at or "
                f"below {nodes[mass].min().item():.2e}; add damping: A + c * Identity.like(A)"
            )
        n: int = self.A.shape[0]
        logs: Tensor = (weights * torch.where(mass, nodes, 1.0).log()).sum(0)
        return logs * n

    def samples(self, state: _State) -> int:
        return state.values.shape[0]

    def read(self, state: _State) -> Band:
        if state.quadrature.group is not None and state.values.shape[0] == 0:
            band, open_end = _read(*self._values(state.quadrature))
        else:
            band, open_end = _read(state.values, state.open_ends)
        return replace(band, low=band.low - open_end, high=band.high + open_end)

    def verdict(self, state: _State) -> Any:
        return None if not state.history else super().verdict(state)

    def report(self, state: _State) -> str:
        group = state.quadrature.group
        step = "" if group is None else f", step {group.alpha.shape[0]}"
        return (super().report(state) if state.history else "first probes") + step

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "steps": self.steps}

    def pack(self, state: _State) -> dict[str, Any]:
        packed = super().pack(state)
        quadrature = {f"quadrature.{k}": v for k, v in packed.pop("quadrature").pack().items()}
        return {**packed, **quadrature}

    def unpack(self, saved: Mapping[str, Any]) -> _State:
        prefix = "quadrature."
        inner = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        outer = {k: v for k, v in saved.items() if not k.startswith(prefix)}
        return super().unpack({**outer, "quadrature": Quadrature.unpack(inner)})


_EVERY = 4  # steps between two looks at the quadrature


def _read(values: Tensor, open_ends: Tensor) -> tuple[Band, Tensor]:
    return mean(values), open_ends.mean()
