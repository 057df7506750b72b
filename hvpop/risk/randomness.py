"""Random numbers that repeat: from a seed of our own, with the user's put back afterwards."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def private_rng(seed: int) -> Iterator[None]:
    """torch's, NumPy's and Python's global random numbers start from ``seed``, and are put back."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
            if devices:
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class Seeded(AbstractContextManager[None]):
    """torch's random numbers start from ``seed``, a 0-dim integer tensor; the user's are put back."""

    def __init__(self, seed: Tensor | None) -> None:
        # A fake tensor means that the evaluation is being traced, not run.
        self._seed = int(seed) if type(seed) is Tensor else None

    def __enter__(self) -> None:
        if self._seed is not None:
            self._state = torch.get_rng_state()
            self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            torch.default_generator.manual_seed(self._seed)
            if self._cuda:
                torch.cuda.manual_seed_all(self._seed)

    def __exit__(self, *exception: object) -> None:
        if self._seed is not None:
            torch.set_rng_state(self._state)
            if self._cuda:
                torch.cuda.set_rng_state_all(self._cuda)


class SeededThroughout(Seeded):
    """As `Seeded`, with NumPy's and Python's random numbers and the generators that modules hold.

    Takes twenty times as long, so it is for models that need it, which ``needed`` tells after
    a first evaluation with a seed.
    """

    def __init__(self, seed: Tensor | None, modules: list[nn.Module]) -> None:
        super().__init__(seed)
        kinds = torch.Generator, np.random.Generator, random.Random
        held = [g for m in modules for g in vars(m).values() if isinstance(g, kinds)]
        self.needed: bool | None = True if held else None
        self._generators: list[Any] = [random, np.random, *held]

    def __enter__(self) -> None:
        super().__enter__()
        if self._seed is not None:
            self._before = [_state(g) for g in self._generators]
            for generator in self._generators:
                _seed(generator, self._seed)
            self._start = pickle.dumps([_state(g) for g in (random, np.random)])

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self._seed is not None:
            now = pickle.dumps([_state(g) for g in (random, np.random)])
            self.needed = bool(self.needed) or now != self._start
            for generator, state in zip(self._generators, self._before, strict=True):
                _restore(generator, state)


def torch_states() -> list[Tensor]:
    """The states of torch's own random numbers, on every device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


@cache
def seed_tensor(seed: int) -> Tensor:
    """The seed as data of a function, so that functions which differ by it alone are one."""
    return torch.tensor(seed, device="cpu")


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if generator is np.random or isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate()


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif generator is np.random or isinstance(generator, torch.Generator):
        generator.set_state(state)
    else:
        generator.setstate(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed % 2**32)


def checked_seed(seed: Any) -> int:
    """The seed, if torch's generators can start from it."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    return int(seed)
