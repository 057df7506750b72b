"""Sampling by Lanczos quadrature: groups of probes, the first of which may be followed to the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from ..operators import probes
from .quadrature import Block, Quadrature, Recurrences
from .sampling import SMALL, SampledState, Sampling


class SpectralState(SampledState, Protocol):
    """A state with a quadrature."""

    @property
    def quadrature(self) -> Quadrature: ...


Q = TypeVar("Q", bound=SpectralState)


class SpectralSampling(Sampling[Q]):
    """Estimates of sums over the spectrum, a product a step and probe."""

    steps: int
    vectors = ("quadrature.group.last", "quadrature.group.current", "quadrature.group.Q")

    @abstractmethod
    def length(self, state: Q) -> int:
        """How many steps another probe is expected to take."""

    def price(self, state: Q) -> int:
        group = state.quadrature.group
        if group is not None:
            return group.current.shape[1]
        # another group is begun only if it can be finished
        return 1 if state.products == 0 else self.length(state) * min(2, self.block)

    def stepped(self, state: Q, left: int) -> Quadrature:
        """After one step of the probes at work, or of new ones."""
        n, whole = self.A.shape[0], self.affordable and state.products == 0
        affordable = self.block if whole else max(1, left // self.length(state))

        def begin() -> Recurrences | Block:
            V = self.drawn(probes.gaussian, self.space, state, affordable)
            kind = Block if n <= max(self.budget, SMALL) else Recurrences
            return kind.begin(self.space, V)

        return state.quadrature.stepped(self.source, begin)

    def completes(self, state: Q) -> bool:
        """Whether the probes at work may be followed to the end of their space, all of the spectrum."""
        whole = isinstance(state.quadrature.group, Block) and state.quadrature.probes == 0
        return self.affordable and whole

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "steps": self.steps}
