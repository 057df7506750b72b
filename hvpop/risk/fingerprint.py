"""Whether tensors are still what they were: identity, memory, versions and norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of a set of tensors to notice any change of their values.

    Versions and addresses catch replaced tensors and ordinary in-place writes. Fused optimizers,
    ``.data`` and NumPy views write without raising the version: norms catch those. Cost: one norm
    per tensor, far below one product.
    """

    places: tuple[tuple[str, int, int, int], ...]  # name, id, address, version
    norms: tuple[float, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Fingerprint:
        """Take the fingerprint of named tensors."""
        places = tuple(
            (name, id(t), t.data_ptr(), 0 if t.is_inference() else t._version)
            for name, t in tensors.items()
        )
        with torch.no_grad():
            norms = [float(t.detach().double().norm()) for t in tensors.values() if t.numel()]
        return cls(places, tuple(norms))
