"""Random vectors that depend on a seed and a place alone, never on the global generator."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator of its own for every key, so that a resumed run draws what the first one would."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


def gaussian(
    n: int, count: int, dtype: torch.dtype, device: torch.device, *key: object, skip: int = 0
) -> Tensor:
    """Standard normal columns, ``(n, count)``; those of a key that come after the first ``skip``."""
    source = generator(device, *key)
    rows = torch.empty(count, n, dtype=dtype, device=device)
    for i in range(-skip, count):  # one by one: how many are drawn at once changes none of them
        rows[max(i, 0)].normal_(generator=source)
    return rows.T


def sphere(
    n: int, count: int, dtype: torch.dtype, device: torch.device, *key: object, skip: int = 0
) -> Tensor:
    """Columns uniform on the sphere of radius sqrt(n)."""
    Z = gaussian(n, count, dtype, device, *key, skip=skip)
    Z *= math.sqrt(n) / torch.linalg.vector_norm(Z, dim=0)
    return Z


def signs(
    n: int, count: int, dtype: torch.dtype, device: torch.device, *key: object, skip: int = 0
) -> Tensor:
    """Columns of independent signs, +1 or -1 (Rademacher)."""
    source = generator(device, *key)
    rows = torch.empty(count, n, dtype=dtype, device=device)
    for i in range(-skip, count):
        rows[max(i, 0)].random_(0, 2, generator=source)
    return rows.mul_(2).sub_(1).T
