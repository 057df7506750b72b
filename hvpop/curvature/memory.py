"""Memory budgets: how much there is, how much is asked for, how much a graph keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import isfinite
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from ..exchange import SavedTensors
from ..graph import saved_by
from ..operators.base import Memory
from ..strategies import LinearMap
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
    """Bytes that can still be allocated on a device: of the machine's, and within this process's limits."""
    if device.type == "cuda":
        in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + in_reserve  # torch's, not given back
    known = [*_of_the_machine(), *of_control_groups(), *_of_the_process()]
    return max(0, min(known, default=4 * 2**30))  # 4 GiB: an operating system that does not say


def _of_the_machine() -> Iterator[int]:
    kibibytes = _numbers(Path("/proc/meminfo")).get("MemAvailable:")
    if kibibytes is not None:
        yield kibibytes * 1024


def of_control_groups(proc: str = "/proc", mounts: str = "/sys/fs/cgroup") -> Iterator[int]:
    """What the control groups of this process leave, of either version, those above them included.

    What a container sees of its own group is the top of the mount, whatever the group's name is.
    """
    lines: list[str] = []
    with suppress(OSError):
        lines = (Path(proc) / "self" / "cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            top, *files = Path(mounts), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = Path(mounts) / "memory"
            files = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"]
        else:
            continue
        limit, used, reclaimable = files
        group = top / name.strip("/")
        for folder in (
            group,
            *(parent for parent in group.parents if top in (parent, *parent.parents)),
        ):
            with suppress(OSError, ValueError):  # no such file at the top; no limit is "max"
                most, taken = (int((folder / file).read_text()) for file in (limit, used))
                cached = _numbers(folder / "memory.stat").get(reclaimable, 0)
                yield most - taken + min(cached, taken)


def _of_the_process() -> Iterator[int]:
    """What ``ulimit`` leaves: of addresses, of data, and of what is resident."""
    with suppress(ImportError):  # not on Windows
        import resource

        status = _numbers(Path("/proc/self/status"))
        kinds = (
            (resource.RLIMIT_AS, "VmSize:"),
            (resource.RLIMIT_DATA, "VmData:"),
            (resource.RLIMIT_RSS, "VmRSS:"),
        )
        for kind, used in kinds:
            most, _ = resource.getrlimit(kind)
            if most != resource.RLIM_INFINITY:
                yield most - status.get(used, 0) * 1024


def _numbers(file: Path) -> dict[str, int]:
    """Lines such as ``MemFree: 12 kB``, those without a number left out."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in file.read_text().splitlines():
            name, *words = line.split()
            if words and words[0].isdecimal():
                found[name] = int(words[0])
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The memory behind some tensors, shared storage counted once."""
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Addresses and sizes, without those of tensors that have none: nested ones, forward mode's zeros."""
    found: dict[int, int] = {}
    for tensor in tensors:
        with suppress(RuntimeError):  # sparse ones, too
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def map_bytes(linear: LinearMap, known: Iterable[Tensor]) -> int | None:
    """The memory that a map's graphs keep beyond ``known`` tensors; None if they do not show it."""
    if linear.ends is None:
        return None
    try:
        saved = _storages(saved_by(linear.ends))
    except (LookupError, RuntimeError):  # the latter from what was written to since
        return None
    return sum(saved[address] for address in saved.keys() - _storages(known).keys())


def graph_bytes(build: Callable[[], object], known: Iterable[Tensor]) -> int:
    """The memory that what ``build()`` makes keeps beyond ``known`` tensors, in a graph and beside it.

    For graphs that do not show it once they are there.
    """
    saved: dict[int, int] = {}

    def look(tensor: Tensor) -> None:
        if tensor.layout is torch.strided:
            saved.update(_storages([tensor]))

    with SavedTensors(look):
        beside: int = getattr(build(), "beside", 0)
    for address in _storages(known):
        saved.pop(address, None)
    return sum(saved.values()) + beside


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
