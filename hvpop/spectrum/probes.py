"""Random vectors that depend on a seed and a place alone, never on the global generator."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..operators import Space


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
    Z *= (math.sqrt(space.n) / space.norms(Z)).to(Z.dtype)
    return Z


def signs(space: Space, count: int, *key: object, skip: int = 0) -> Tensor:
    """Columns of independent signs, +1 or -1 (Rademacher)."""
    source = generator(space.device, *key)
    V = space.random(lambda v: v.random_(0, 2, generator=source), count, skip)
    return V.mul_(2).sub_(1)
