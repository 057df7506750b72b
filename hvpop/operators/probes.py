"""Random vectors that depend on a seed and a place alone, never on the global generator."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from .space import Space


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator of its own for every key, so that a resumed run draws what the first one would."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


def gaussian(space: Space, count: int, *key: object, skip: int = 0) -> Tensor:
    """Standard normal columns, ``(n, count)``; those of a key that come after the first ``skip``."""
    source = generator(space.device, *key)
    return space.random(lambda v: v.normal_(generator=source), count, skip)


def sphere(space: Space, count: int, *key: object, skip: int = 0) -> Tensor:
    """Columns uniform on the sphere of radius sqrt(n)."""
    Z = gaussian(space, count, *key, skip=skip)
    Z *= (math.sqrt(space.order) / space.norms(Z)).to(Z.dtype)
    return Z


def signs(space: Space, count: int, *key: object, skip: int = 0) -> Tensor:
    """Columns of independent signs, +1 or -1 (Rademacher)."""
    source = generator(space.device, *key)
    bits = torch.arange(256, device=space.device)[:, None] >> torch.arange(8, device=space.device)
    of_bytes = ((bits & 1) * 2 - 1).to(space.dtype)  # (256, 8)

    def fill(v: Tensor) -> None:
        """Eight signs from a random byte: random numbers are dear."""
        draws = torch.empty(-(-len(v) // 8), dtype=torch.uint8, device=v.device)
        places = draws.random_(generator=source).int()
        whole = len(v) // 8 * 8
        torch.index_select(of_bytes, 0, places[: whole // 8], out=v[:whole].view(-1, 8))
        v[whole:] = of_bytes[int(places[-1]), : len(v) - whole]

    return space.random(fill, count, skip)
