"""Estimates from random probes: a band around the mean, and sampling until it is narrow enough."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.crossing import working_dtype
from .loop import Task, run
from .results import Estimate, Status

History = tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Band:
    """An estimate, a number or one for every entry, with its 95 % confidence interval."""

    value: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor

    def error(self) -> float:
        """Half the width, in the Euclidean norm if there are many entries."""
        return float(torch.linalg.vector_norm((self.high - self.low) / 2))

    def size(self) -> float:
        """The norm of the value."""
        return float(torch.linalg.vector_norm(self.value))


def student(value: Tensor, standard_error: Tensor, samples: int) -> Band:
    """The band of a mean of ``samples`` samples, by Student's t, which knows that they are few."""
    if samples < 2:
        standard_error = torch.full_like(value, torch.inf)
        return Band(value, standard_error, value - torch.inf, value + torch.inf)
    half = float(stdtrit(samples - 1, 0.975)) * standard_error
    return Band(value, standard_error, value - half, value + half)


def mean(samples: Tensor) -> Band:
    """The band of the mean of independent samples, which run along the last dimension."""
    count = samples.shape[-1]
    spread = samples.std(-1) if count > 1 else torch.zeros_like(samples[..., 0])
    return student(samples.mean(-1), spread / count**0.5, count)


class SampledState(Protocol):
    """A state that remembers how the estimate went."""

    @property
    def products(self) -> int: ...
    @property
    def history(self) -> History: ...


S = TypeVar("S", bound=SampledState)


class Sampling(Task[S]):
    """A task that draws probes in rounds of up to ``block`` until the band is narrow enough."""

    unit: int  # products for one probe
    least = 16  # probes before an error is believed
    state_type: type[S]

    def __init__(self, A: LinearOperator, rtol: float | None, block: int, seed: int) -> None:
        arguments.positive(self.name, rtol=rtol)
        arguments.counts(self.name, block=block)
        self.A, self.rtol, self.block, self.seed = A, rtol, block, seed
        self.dtype = working_dtype(A.torch_dtype)

    @abstractmethod
    def read(self, state: S) -> Band:
        """The estimate as it is now."""

    def band(self, state: S) -> Band:
        """The estimate, with the rounding of the products in its band."""
        band = self.read(state)
        rounding = 10 * torch.finfo(self.dtype).eps * band.value.abs()
        return replace(band, low=band.low - rounding, high=band.high + rounding)

    @abstractmethod
    def samples(self, state: S) -> int:
        """How many probes the error is judged from."""

    def exhausted(self, state: S) -> bool:
        """Whether the estimate is exact, and nothing is left to sample."""
        return False

    def price(self, state: S) -> int:
        return self.unit

    def placed(self, state: S) -> int:
        """How many probes have been drawn."""
        return self.samples(state)

    def drawn(
        self, draw: Callable[..., Tensor], n: int, state: S, affordable: int, *key: object
    ) -> Tensor:
        """The next probes, ``(n, count)``: the rest of a round of ``block``, or what is affordable of it.

        Where a budget cuts a round short, a run that goes on with more takes what was left.
        """
        placed = self.placed(state)
        used = placed % self.block
        count = min(self.block - used, affordable)
        key = (self.seed, self.name, (placed - used) * self.unit, *key)
        return draw(n, count, *self.like().values(), *key, skip=used)

    def noted(self, state: S) -> S:
        """``state`` with its estimate added to the history."""
        band = self.band(state)
        entry = (state.products, band.size(), band.error())
        return replace(state, history=(*state.history, entry))  # type: ignore[type-var]

    def verdict(self, state: S) -> Status | None:
        if self.exhausted(state):
            return "converged"
        if self.rtol is None or self.samples(state) < self.least:
            return None
        _, value, error = state.history[-1]
        return "converged" if error <= self.rtol * value else None

    def report(self, state: S) -> str:
        _, value, error = state.history[-1]
        return f"{value:.4g} +- {error:.1e}"

    def settings(self) -> Mapping[str, Any]:
        return {"block": self.block, "seed": self.seed}

    def pack(self, state: S) -> dict[str, Any]:
        return {**super().pack(state), "history": [list(entry) for entry in state.history]}

    def unpack(self, saved: Mapping[str, Any]) -> S:
        history = tuple((count, value, error) for count, value, error in saved["history"])
        return self.state_type(**{**saved, "history": history})

    def estimate(
        self, max_products: int, progress: bool, checkpoint: str | os.PathLike[str] | None
    ) -> Estimate:
        """Run, and return the number with its error."""
        state, status = sample(self, max_products, progress, checkpoint)
        band = self.band(state)
        return Estimate(
            band.value.item(), band.standard_error.item(), band.low.item(), band.high.item(),
            state.products, status, state.history,
        )  # fmt: skip

    def like(self) -> dict[str, Any]:
        """Where and in what dtype vectors live."""
        return {"dtype": self.dtype, "device": self.A.device}


def sample(
    task: Sampling[S], max_products: int, progress: bool, checkpoint: str | os.PathLike[str] | None
) -> tuple[S, Status]:
    """`run`, after a check that the budget is enough for two probes."""
    arguments.counts(task.name, max_products=max_products)
    if max_products < 2 * task.unit:
        raise ValueError(
            f"{task.name} expects max_products >= {2 * task.unit}, two probes, got {max_products}"
        )
    return run(task, max_products=max_products, progress=progress, checkpoint=checkpoint)
