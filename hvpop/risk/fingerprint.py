"""Whether tensors are still what they were: identity, memory, versions and norms."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._torch import content


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of a set of tensors to notice any change of their values.

    Versions and addresses catch replaced tensors and ordinary in-place writes. Fused optimizers,
    ``.data`` and NumPy views write without raising the version: sums catch those. Squares alone
    would miss changed signs and permuted entries, which the second sum sees. Cost: two sums per
    tensor, far below one product.
    """

    places: tuple[tuple[str, int, int, int], ...]  # name, id, address, version
    sums: tuple[str, ...]  # of squares, and of entries times their positions

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Fingerprint:
        """Take the fingerprint of named tensors."""
        places = tuple(
            (name, id(t), t.data_ptr(), 0 if t.is_inference() else t._version)
            for name, t in tensors.items()
        )
        with torch.no_grad():
            found = [sums(t) for t in tensors.values()]
        return cls(places, tuple(found))


def sums(thing: Any) -> str:
    """The sums of squares and of entries times their positions, as text; of no array, the thing."""
    if isinstance(thing, np.ndarray):
        if thing.dtype.kind not in "biufc":  # names, dates, objects
            return repr(thing.tolist())
        wide = np.complex128 if thing.dtype.kind == "c" else np.float64
        thing = torch.from_numpy(thing.astype(wide))
    if not isinstance(thing, Tensor):
        return repr(thing)
    tensor = thing.detach()
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    entries = (torch.view_as_real(dense) if dense.is_complex() else dense).reshape(-1)
    size = min(len(entries), _CHUNK)
    positions = torch.arange(1.0, size + 1, dtype=torch.double, device=entries.device)
    squares = weighted = 0.0
    for chunk in entries.split(_CHUNK):
        x = chunk.double()
        squares += float(x @ x)
        weighted += float(x @ positions[: len(x)])
    return f"{squares.hex()} {weighted.hex()}"  # text, since NaN does not equal itself


def checksum(array: Tensor | np.ndarray) -> int:
    """Of the bits of a dense array on the host, which no number of threads rounds otherwise."""
    if isinstance(array, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(array).data)
    return zlib.crc32(content(array.detach().resolve_conj().resolve_neg().contiguous()))


_CHUNK = 2**20  # entries at a time, so that no large tensor is copied whole
