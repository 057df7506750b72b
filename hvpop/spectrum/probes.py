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


def gaussian(n: int, count: int, dtype: torch.dtype, device: torch.device, *key: object) -> Tensor:
    """Standard normal columns, ``(n, count)``."""
    return torch.randn(n, count, dtype=dtype, device=device, generator=generator(device, *key))


def sphere(n: int, count: int, dtype: torch.dtype, device: torch.device, *key: object) -> Tensor:
    """Columns uniform on the sphere of radius sqrt(n)."""
    Z = gaussian(n, count, dtype, device, *key)
    Z *= math.sqrt(n) / torch.linalg.vector_norm(Z, dim=0)
    return Z


def signs(n: int, count: int, dtype: torch.dtype, device: torch.device, *key: object) -> Tensor:
    """Columns of independent signs, +1 or -1 (Rademacher)."""
    bits = torch.randint(0, 2, (n, count), device=device, generator=generator(device, *key))
    return (2 * bits - 1).to(dtype)
