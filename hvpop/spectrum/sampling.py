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

from ..operators import LinearOperator, Space, arguments
from ..operators.arguments import Seed
from ..operators.crossing import working_dtype
from ..operators.measured import Measured
from .known import Known
from .loop import Task, run
from .results import Estimate, Status

History = tuple[tuple[int, float, float], ...]

# Numbers in a block by default. It looks at n alone: what looked at the memory that is free as well would make
# another computation of the same call, with other numbers, whose checkpoint nobody else could continue.
AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Band:
    """An estimate, a number or one for every entry, with its 95 % confidence interval."""

    value: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor

    def error(self, space: Space | None = None) -> float:
        """Half the width, in the Euclidean norm (of ``space``) if there are many entries."""
        return _length((self.high - self.low) / 2, space)

    def size(self, space: Space | None = None) -> float:
        """The norm of the value."""
        return _length(self.value, space)

    def scaled(self, unit: float) -> Band:
        """For a multiple of the operator."""
        return Band(*(unit * part for part in vars(self).values()))


def _length(x: Tensor, space: Space | None = None) -> float:
    columns = x.reshape(-1, 1)
    own = space if space is not None and x.ndim else Space.of(columns)
    return float(own.norms(columns))


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
    budget = 0  # products, set before the run
    usual = 16  # probes a round, where they are short

    def __init__(
        self, A: LinearOperator, rtol: float | None, block: int | None, seed: Seed
    ) -> None:
        if block is None:
            block = max(1, min(self.usual, AT_ONCE // max(1, *A.shape)))
        arguments.positive(self.name, rtol=rtol)
        arguments.counts(self.name, block=block)
        self.A, self.rtol, self.block = A, rtol, block
        self.seed = arguments.seed(self.name, seed)
        self.dtype = working_dtype(A.torch_dtype)
        self.source, self.space = Measured(self.name, A), A.space
        self.order = min(A.shape)  # as many products tell all of it

    @property
    def affordable(self) -> bool:
        """Whether the budget is enough for the exact answer."""
        return bool(self.order <= self.budget) and not self.space.shared  # that takes whole vectors

    @abstractmethod
    def read(self, state: S) -> Band:
        """The estimate as it is now, of the operator in units of the source."""

    def restored(self, band: Band) -> Band:
        """What a band in units of the source says of the operator itself."""
        return band.scaled(self.source.unit)

    def judged(self, state: S) -> Band:
        """`read`, or something better that a subclass knows."""
        return self.read(state)

    def band(self, state: S) -> Band:
        """The estimate, with the rounding of the products in its band."""
        return self.restored(self.rounded(self.judged(state)))

    def rounded(self, band: Band) -> Band:
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
        self, draw: Callable[..., Tensor], space: Space, state: S, affordable: int, *key: object
    ) -> Tensor:
        """The next probes, ``(n, count)``: the rest of a round of ``block``, or what is affordable of it.

        Where a budget cuts a round short, a run that goes on with more takes what was left.
        """
        placed = self.placed(state)
        used = placed % self.block
        count = min(self.block - used, affordable)
        key = (self.seed, self.name, (placed - used) * self.unit, *key)
        return draw(space, count, *key, skip=used)

    def measures(self, state: S) -> tuple[float, float]:
        """The sizes of the estimate and of its error."""
        band, unit = self.rounded(self.judged(state)), self.source.unit
        return unit * band.size(self.space), unit * band.error(self.space)

    def noted(self, state: S) -> S:
        """``state`` with its estimate added to the history."""
        entry = (state.products, *self.measures(state))
        return replace(state, history=(*state.history, entry))  # type: ignore[type-var]

    def verdict(self, state: S) -> Status | None:
        if self.exhausted(state):
            return "converged"
        if self.rtol is None or self.samples(state) < self.least:
            return None
        _, value, error = state.history[-1]
        return "converged" if error <= self.rtol * value else None

    def named(self, state: S, status: Status) -> Status:
        """What to call an end that came by ``status``."""
        return status

    def report(self, state: S) -> str:
        _, value, error = state.history[-1]
        return f"{value:.4g} +- {error:.1e}"

    def settings(self) -> Mapping[str, Any]:
        return {"block": self.block, "seed": self.seed}

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


class CompletableState(SampledState, Protocol):
    """A state that remembers what its products tell of the whole matrix."""

    @property
    def known(self) -> Known: ...


C = TypeVar("C", bound=CompletableState)


class Completing(Sampling[C]):
    """Sampling that remembers what its products tell, and ends with the whole matrix if need be.

    That costs as many products as the order, those of the probes included. It is begun at once where
    no error would be believed before, else while the probes are still well independent.
    """

    vectors: tuple[str, ...] = ("known.Q", "known.AQ")

    def __init__(
        self, A: LinearOperator, rtol: float | None, block: int | None, seed: Seed
    ) -> None:
        super().__init__(A, rtol, block, seed)
        self.wide = A.shape[0] < A.shape[1]  # whose transpose is known sooner

    @abstractmethod
    def sampled(self, state: C, left: int) -> C:
        """The state after a round of probes."""

    @abstractmethod
    def of_matrix(self, known: Known) -> Tensor:
        """The value, from all of the matrix or of its transpose; an extrapolation from a part."""

    def nothing(self) -> Known:
        """What is known before the first product."""
        return Known.nothing(self.source.T if self.wide else self.source, self.dtype)

    def advance(self, state: C, left: int) -> C:
        if self._completes(state):
            known = state.known.completed(
                self.source.T if self.wide else self.source, min(self.block, left)
            )
            products = state.products + known.count - state.known.count
            return self.noted(replace(state, known=known, products=products))  # type: ignore[type-var]
        remember = not self.wide and not self.space.shared and self.order <= max(self.budget, SMALL)
        self.source.taken = [] if remember else None
        state = self.sampled(state, left)
        return self.noted(replace(state, known=self.learned(state)))  # type: ignore[type-var]

    def learned(self, state: C) -> Known:
        """What is known after the products of this round."""
        known = state.known
        for V, Y in self.source.taken or ():
            known = known.learned(V, Y)
        return known

    def flat(self, state: C, E: Tensor) -> bool:
        """Whether a basis ``E`` of what the products gave is nothing new, and all else can be had.

        So it is for a multiple of the identity: its sketch says nothing, and samples of its rest vary.
        """
        known = self.learned(state)
        whole = self.affordable and known.count > state.known.count
        return whole and state.known.count == state.products and not known.adds(E)

    def hopeless(self) -> bool:
        """Whether sampling would cost as much as all of the matrix, as far as can be told before."""
        return self.rtol is None or self.order <= self.unit * self.least

    def price(self, state: C) -> int:
        return 1 if self._completes(state) else self.unit

    def exhausted(self, state: C) -> bool:
        return bool(state.known.count == self.order)

    def judged(self, state: C) -> Band:
        """The exact value once there is one, what little is known before any probe, or the samples'."""
        known, probes_ = state.known, self.samples(state)
        if probes_ and not self.exhausted(state):
            return self.read(state)
        value = self.of_matrix(known)
        if not self.exhausted(state):
            return student(value, value, 0)
        eps = torch.finfo(self.dtype).eps
        rounding = 10 * eps ** (0.75 if probes_ else 1.0) * _length(known.AQ.T)
        return Band(value, torch.zeros_like(value), value - rounding, value + rounding)

    def _completes(self, state: C) -> bool:
        if not self.affordable or state.known.count < state.products:
            return False
        begun = self.samples(state) * self.unit < state.products
        late = state.products + self.unit * self.block > 3 * self.order // 4
        return begun or late or self.hopeless()


SMALL = 1024
"""Up to this order products are remembered though the budget is smaller: it may be raised."""


def chosen(
    who: str, A: LinearOperator, method: str | None, methods: Mapping[str, type[Sampling[Any]]]
) -> type[Sampling[Any]]:
    """The task of a method; by default the first one where vectors are short enough to be kept."""
    entries = max(arguments.operator(who, A).shape)
    if method is None:
        method = next(iter(methods)) if entries <= 1 << 20 else "hutchinson"
    if method not in methods:
        raise ValueError(f"{who} expects method in {tuple(methods)}, got {method!r}")
    if method == "hutchinson":
        arguments.square(who, A)
    else:
        instead = "method='hutchinson' takes any square one"
        arguments.symmetric(f"{who} by {method}", A, instead)
    return methods[method]


def sample(
    task: Sampling[S], max_products: int, progress: bool, checkpoint: str | os.PathLike[str] | None
) -> tuple[S, Status]:
    """`run`, after a check that the budget is enough for two probes or for all of the matrix."""
    arguments.required(task.name, max_products=max_products)
    least = min(2 * task.unit, task.order)
    if max_products < least:
        raise ValueError(
            f"{task.name} expects max_products >= {least}, two probes, got {max_products}"
        )
    task.budget = max_products
    enough = min(max_products, task.order)
    state, status = run(task, max_products=enough, progress=progress, checkpoint=checkpoint)
    return state, task.named(state, status)
