"""Memory budgets: how much there is, how much is asked for, how much a graph keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import isfinite
from numbers import Real

import torch
from torch import Tensor

from ..exchange import SavedTensors
from ..operators.base import Memory
from ..strategies.rounding import rounding

FREE_FRACTION = 0.25
"""The default budget: this much of the memory that is free. Leaves room for what solvers keep
(a Krylov basis) and for the transient tensors of a product."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def budget_in_bytes(memory: Memory, device: torch.device) -> int:
    """The budget in bytes, from a number, text such as ``"2GiB"``, or None for the default."""
    if memory is None:
        return int(FREE_FRACTION * free_memory(device))
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", memory)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"memory must be bytes or text such as '2GiB', got {memory!r}")
        return int(float(match[1]) * _UNITS[match[2].lower()])
    if isinstance(memory, bool) or not isinstance(memory, Real) or not isfinite(memory):
        raise TypeError(f"memory must be bytes or text such as '2GiB', got {memory!r:.60}")
    if memory < 0:
        raise ValueError(f"memory must not be negative, got {memory}")
    return int(memory)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 2**30  # an operating system that does not say


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The memory behind some tensors, shared storage counted once."""
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Addresses and sizes, without those of tensors that have none: nested ones, forward mode's zeros."""
    found: dict[int, int] = {}
    for tensor in tensors:
        with suppress(RuntimeError):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def graph_bytes(build: Callable[[], object], known: Iterable[Tensor]) -> int:
    """The memory that the autograd graph made by ``build()`` keeps beyond ``known`` tensors."""
    saved: dict[int, int] = {}

    def look(tensor: Tensor) -> None:
        if tensor.layout is torch.strided:
            saved.update(_storages([tensor]))

    with SavedTensors(look):
        build()
    for address in _storages(known):
        saved.pop(address, None)
    return sum(saved.values())


def graph_rounding(build: Callable[[], object]) -> float:
    """The eps of the least precise numbers in the graph made by ``build()``: autocast leaves such."""
    coarsest = 0.0

    def look(tensor: Tensor) -> None:
        nonlocal coarsest
        if tensor.is_floating_point():
            coarsest = max(coarsest, rounding([tensor]))

    with SavedTensors(look):
        build()
    return coarsest
