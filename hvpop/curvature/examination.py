"""An operator under examination: its batches, its point, and the products that it gives there."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..risk import EmpiricalRisk, Term
from ..strategies import FiniteDifference, FirstThatWorks, HVPStrategy, Params
from ..strategies.fallback import settled
from ..strategies.rounding import rounding
from .diagnosis import culprit
from .findings import Finding, Level, Timing
from .referee import Difference, difference
from .space import WeightedSum, from_point, multiplier, to_point

if TYPE_CHECKING:
    from .hessian import HessianOperator


@dataclass
class Examination:
    """Some batches at the point of the moment, what can be measured there, and the findings so far."""

    H: HessianOperator
    risk: EmpiricalRisk  # in batch mode
    strategy: HVPStrategy
    terms: list[Term]
    point: Params
    state: Params
    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def note(self, level: Level, what: str, detail: str) -> None:
        if all(detail != finding.detail for finding in self.findings):
            self.findings.append(Finding(level, what, detail))

    @property
    def failed(self) -> bool:
        return any(finding.level == "wrong" for finding in self.findings)

    def products(self, strategy: HVPStrategy, *blocks: Tensor) -> list[Tensor]:
        """The products of some blocks (n, k), in turn by the same maps."""
        multiply = [multiplier(self._columns(V)) for V in blocks]

        def compute() -> list[Tensor]:
            totals = [WeightedSum(self.risk.average.normalized) for _ in blocks]
            for term in self.terms:
                linear = strategy.linearize(term.function, self.point, self.state, *term.data)
                for total, times in zip(totals, multiply, strict=True):
                    total.add(times(linear), term.weight)
            return [from_point(t.result(), V) for t, V in zip(totals, blocks, strict=True)]

        return settled(strategy, compute)

    def probe(self, seed: int) -> Tensor:
        """A normal column, shape (n, 1)."""
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(self.H.shape[1], 1, generator=generator, dtype=torch.float64)
        double = self.H.torch_dtype == torch.float64
        return v.to(self.H.device, torch.float64 if double else torch.float32)

    def difference(self, v: Tensor) -> Difference:
        direction = {name: column[0] for name, column in self._columns(v).items()}
        return difference(self.risk, self.terms, self.point, self.state, direction)

    def culprit(self, v: Tensor) -> str:
        place = self.terms, self.point, self.state
        return culprit(*place, self.strategy, self._columns(v))

    def _columns(self, V: Tensor) -> Params:
        return to_point(V, self.H.layout, self.point)

    @property
    def tolerance(self) -> float:
        """Relative, for products against each other and against differences of gradients."""
        return 1e-6 if self._eps < 1e-12 else 2e-2 if self._eps < 1e-6 else 1e-1

    @property
    def rounding(self) -> float:
        """Relative, for what differs by rounding alone, be it that of float32 in a float64 model."""
        if isinstance(getattr(self.strategy, "current", self.strategy), FiniteDifference):
            return self.tolerance
        return min(max(1e4 * self._eps, 1e-6), 5e-2)

    @property
    def _eps(self) -> float:
        return rounding(self.point.values())


def admitted(H: HessianOperator, batches: int | None) -> Examination:
    """The first batches of an operator, or all, at copies of the live parameters."""
    risk = H.risk.batchwise()
    point = {name: p.detach().clone() for name, p in risk.parameters().items()}
    state = {name: t.clone() for name, t in risk.state().items()}
    strategy = H.strategy
    if isinstance(strategy, FirstThatWorks):
        strategy = FirstThatWorks(
            *strategy.chain
        )  # steps down the chain are the operator's to take
    with closing(risk.terms()) as terms:
        return Examination(H, risk, strategy, list(islice(terms, batches)), point, state)
