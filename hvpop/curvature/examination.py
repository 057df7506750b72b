"""An operator under examination: its batches, its point, and the products that it gives there."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from ..operators import Layout
from ..risk import EmpiricalRisk, Term
from ..strategies import FiniteDifference, HVPStrategy, Params
from ..strategies.fallback import settled
from ..strategies.referee import norm
from ..strategies.rounding import nudged, rounding
from .diagnosis import culprit
from .findings import Finding, Level, Timing
from .referee import over_terms
from .space import WeightedSum, from_point, multiplier, to_point


class Examined(Protocol):
    """What is examined."""

    risk: EmpiricalRisk
    strategy: HVPStrategy
    torch_dtype: torch.dtype
    device: torch.device

    @property
    def layout(self) -> Layout: ...


@dataclass
class Examination:
    """Some batches at the point of the moment, what can be measured there, and the findings so far."""

    H: Examined
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

    def plain_gradient(self, term: Term) -> Params:
        """What a ``backward()`` on the model as it is gives to those parameters that it reaches."""
        if any(p.is_inference() for p in self.risk.parameters().values()):  # has no backward()
            found = self.risk.gradient(self.point, self.state, *term.data)
        else:
            found = self.risk.function.untouched_gradient(*term.data)
        return {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}

    def gradient_gap(self, term: Term, plain: Params) -> float:
        """How far hvpop's first gradient is from another one, relative, the farthest parameter's.

        At copies of the parameters, so that nothing can be right by chance.
        """
        return self._gap(self.risk.gradient(self.point, self.state, *term.data), plain)

    def repeats(self, term: Term, plain: Params) -> bool:
        """Whether a gradient comes out the same a second time, as that of a random loss does not."""
        return self._gap(self.plain_gradient(term), plain) <= self.rounding

    def _gap(self, own: Params, plain: Params) -> float:
        total, gaps = norm(plain), [0.0]
        for name, g in own.items():
            mine = g.to_dense() if g.is_sparse else g
            other = plain.get(name, torch.zeros_like(mine))
            off = float((mine.double() - other.double()).norm())
            if off > self._eps**0.75 * total:
                gaps.append(off / max(float(mine.double().norm()), float(other.double().norm())))
        return max(gaps)

    def noise(self, v: Tensor) -> float:
        """What rounding makes of a product, relative: how far those at two nearest points differ."""
        near = [replace(self, point=nudged(self.point, seed)) for seed in (3, 4)]
        one, other = (examination.products(self.strategy, v)[0].double() for examination in near)
        return float((other - one).norm() / one.norm().clamp_min(1e-300))

    def probe(self, seed: int) -> Tensor:
        """A normal column, shape (n, 1)."""
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(self.H.layout.size, 1, generator=generator, dtype=torch.float64)
        double = self.H.torch_dtype == torch.float64
        return v.to(self.H.device, torch.float64 if double else torch.float32)

    def difference(self, v: Tensor) -> tuple[Tensor, float]:
        """``H v`` by differences, (n, 1) in float64, and its relative uncertainty.

        Of gradients for the Hessian, of outputs for a matrix that is parted there.
        """
        if not self.strategy.of_gradients:
            eps = self._eps ** (1 / 3)
            steps = (FiniteDifference(step=eps), FiniteDifference(step=4 * eps))
            fine, coarse = (self.products(self.strategy.of(step), v)[0].double() for step in steps)
            return fine, float((coarse - fine).norm() / fine.norm().clamp_min(1e-300))
        direction = {name: column[0] for name, column in self._columns(v).items()}
        found = over_terms(self.risk, self.terms, self.point, self.state, direction)
        pieces = [p.reshape(-1, 1).to(v.device) for p in found.product.values()]
        return torch.cat(pieces), found.error

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
        if not getattr(self.strategy, "current", self.strategy).exact:
            return self.tolerance
        return min(max(1e4 * self._eps, 1e-6), 5e-2)

    @property
    def _eps(self) -> float:
        return rounding(self.point.values())


def admitted(H: Examined, batches: int | None) -> Examination:
    """The first batches of an operator, or all, at copies of the live parameters."""
    risk = H.risk.batchwise()
    point = {name: p.detach().clone() for name, p in risk.parameters().items()}
    state = {name: t.clone() for name, t in risk.state().items()}
    strategy = H.strategy.within(lambda one: one)  # steps down a chain are the operator's to take
    with closing(risk.terms()) as terms:
        return Examination(H, risk, strategy, list(islice(terms, batches)), point, state)
