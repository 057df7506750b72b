"""What processes tell each other before they add up: one all-reduce of a few numbers."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .team import Team

_SUMS = ("weight", "data", "said")
_ALIKE = ("operator", "columns", "left", "vector", "point", "first")

PRIME = 65521
"""Numbers to be compared are below it: squares of sums over a thousand processes are exact in float64."""


class Header:
    """Sums over all processes; whether numbers are equal on all, by ``W sum x^2 = (sum x)^2``."""

    def __init__(
        self,
        team: Team,
        device: torch.device,
        waits: list[float],
        *,
        failed: bool,
        **numbers: float,
    ) -> None:
        self._size = team.size
        alike = [float(int(numbers[name]) % PRIME) for name in _ALIKE]
        by_rank = torch.zeros(2, team.size, dtype=torch.float64)
        by_rank[0, team.rank], by_rank[1, team.rank] = float(failed), waits[team.rank]
        said = [float(numbers[name]) for name in _SUMS] + alike + [x * x for x in alike]
        own = torch.cat([torch.tensor(said, dtype=torch.float64), by_rank.reshape(-1)])
        total: list[float] = team.add_up(own.to(device)).tolist()
        count = len(_SUMS) + len(_ALIKE)
        self._sums: dict[str, float] = dict(zip((*_SUMS, *_ALIKE), total[:count], strict=True))
        self._squares: dict[str, float] = dict(zip(_ALIKE, total[count:], strict=False))
        failures = total[-2 * team.size : -team.size]
        self.failed = next((rank for rank, one in enumerate(failures) if one), None)
        waits[:] = total[-team.size :]

    def __getitem__(self, name: str) -> float:
        return self._sums[name]

    def alike(self, name: str, among: float | None = None) -> bool:
        """Whether a number is the same on all processes, or on so many that have one."""
        count = self._size if among is None else among
        return count * self._squares[name] == self._sums[name] ** 2


def hashed(things: Iterable[Tensor | str]) -> int:
    """A number below `PRIME` that is another for other bits, but for a chance of one in 65,521."""
    sums, total = [], 0
    for thing in things:
        if isinstance(thing, str):
            total = (31 * total + zlib.crc32(thing.encode())) % PRIME
        else:
            sums.append(_bits(thing).sum())
    for one in torch.stack(sums).tolist() if sums else []:
        total = (31 * total + one) % PRIME
    return total


def _bits(tensor: Tensor) -> Tensor:
    """The bits as integers, of eight bytes where they divide into such: of smaller ones sums take longer."""
    dense = tensor.detach()
    if dense.layout is not torch.strided:
        dense = dense.to_dense()
    if not dense.is_contiguous() and dense.T.is_contiguous():
        dense = dense.T
    flat = dense.reshape(-1)
    wide = min(flat.element_size(), 8)
    if flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0:
        wide = 8
    return flat.view(_INTEGERS[wide])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
