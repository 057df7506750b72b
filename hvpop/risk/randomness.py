"""Random numbers that repeat: from a seed of our own, with the user's put back afterwards."""

from __future__ import annotations

import ctypes
import random
from collections import OrderedDict
from collections.abc import Iterable
from functools import cache, lru_cache
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..exchange import Exchange


class PrivateRNG(Exchange):
    """The random numbers of torch, and of others beside it, are put back at the end.

    Parameters
    ----------
    generators
        Of those beside torch: the modules `random` and `numpy.random`, and generator objects.
    """

    def __init__(self, generators: Iterable[Any] = ()) -> None:
        super().__init__()
        self._generators = list(generators)

    def _change(self) -> None:
        self._noted(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_initialized():
            self._noted(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        self.put_back_too(self._generators)

    def put_back_too(self, generators: Iterable[Any]) -> None:
        for generator in generators:
            self._noted(_restore, generator, _state(generator))


def seed_all(seed: int, generators: Iterable[Any] = ()) -> None:
    """Let torch's random numbers, and those of some generators, start from ``seed``."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    for generator in generators:
        _seed(generator, seed)


class private_rng(PrivateRNG):  # noqa: N801 (used like a function)
    """torch's, NumPy's and Python's global random numbers start from ``seed``, and are put back."""

    def __init__(self, seed: int) -> None:
        super().__init__(GLOBAL)
        self._seed = seed

    def _change(self) -> None:
        super()._change()
        seed_all(self._seed, GLOBAL)


GLOBAL: tuple[Any, ...] = (random, np.random)
"""Python's and NumPy's global random numbers."""


def generators_in(modules: Iterable[nn.Module]) -> list[Any]:
    """The generators that modules hold, as attributes or in containers that are attributes."""
    found = {}
    for module in modules:
        for value in vars(module).values():
            if type(value) in _NONE_OF_THESE:
                continue
            if is_generator(value):
                found[id(value)] = value
            elif type(value) in (list, tuple, dict):
                items = value.values() if isinstance(value, dict) else value
                found |= {
                    id(g): g for g in items if type(g) not in _NONE_OF_THESE and is_generator(g)
                }
    return list(found.values())


_NONE_OF_THESE = {bool, int, float, str, type(None), OrderedDict, set, Tensor, nn.Parameter}
"""What most attributes of modules are, passed over at once."""

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def is_generator(thing: Any) -> bool:
    """Whether something draws random numbers; asked once for each class, since torch is slow to tell."""
    kind: Any = type(thing)
    return _is_of_these(kind)


@lru_cache(maxsize=1024)
def _is_of_these(kind: Any) -> bool:
    return issubclass(kind, _KINDS)


def beside_torch() -> tuple[Any, ...]:
    """Something that changes when Python's or NumPy's global random numbers are drawn.

    A look at the memory of NumPy's: to ask for the state takes 40 microseconds.
    """
    bits = _bits()
    if not isinstance(bits, np.random.MT19937):
        return random.getstate(), repr(bits.state)
    interface = bits.ctypes
    return random.getstate(), ctypes.string_at(interface.state_address, _MT19937)


def _bits() -> Any:
    numpy: Any = np.random  # whose stubs leave this out
    return numpy.get_bit_generator()


def rewind(before: tuple[Any, ...]) -> None:
    """Python's and NumPy's global random numbers as they were when `beside_torch` was asked."""
    random.setstate(before[0])
    bits = _bits()
    if isinstance(bits, np.random.MT19937):
        interface = bits.ctypes
        ctypes.memmove(interface.state_address, before[1], _MT19937)


_MT19937 = 4 * 625  # 624 words, and the place among them


def torch_states() -> list[Tensor]:
    """The states of torch's own random numbers, on every device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def seed_tensor(seed: int) -> Tensor:
    """The seed as data of a function, so that functions which differ by it alone are one."""
    return _seed_tensor(seed) if seed < 2**12 else torch.tensor(seed, device="cpu")


@cache
def _seed_tensor(seed: int) -> Tensor:
    return torch.tensor(seed, device="cpu")


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if generator is np.random or isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate()


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif generator is np.random or isinstance(generator, torch.Generator | np.random.RandomState):
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
