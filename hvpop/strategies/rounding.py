"""How far two computations of the same numbers may be apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .. import _torch

FLOAT32_TOLERANCE = 1e-4
"""What float32 leaves of a product, relative: models in float64 may have some inside."""

TF32_EPS = 2.0**-16
"""The eps that float32 has on tensor cores: those round what they multiply to 10 bits and add
exactly, so that a product was off by 1e-4 to 3e-4 on an H200, where 4 eps^(2/3) is 2e-3."""


def rounding(tensors: Iterable[Tensor]) -> float:
    """The eps of the least precise of some numbers, as torch multiplies them."""
    kinds = {(t.dtype, t.device.type) for t in tensors if t.is_floating_point() or t.is_complex()}
    eps = max(torch.finfo(dtype).eps for dtype, _ in kinds)
    if (torch.float32, "cuda") in kinds and _torch.uses_tensor_cores():
        return max(eps, TF32_EPS)
    return eps


def reordered(eps: float) -> float:
    """What two orders of evaluation may differ by, relative.

    By far more than one unit of rounding where sums cancel; a third of the digits are left to that.
    (An error of the method is of order one.)
    """
    return 4 * math.cbrt(eps) ** 2


NOISE = 30
"""So many times what another rounding of the same computation changes is still no difference."""


def agree(
    result: Iterable[Tensor],
    expected: Iterable[Tensor],
    tolerance: float,
    again: Callable[[], Iterable[Tensor]] | None = None,
) -> bool:
    """Whether each tensor is what is expected, to ``tolerance`` of its own norm.

    On one scale for all of them a small one could be anything. What is nothing but rounding has no
    digits to compare: ``again()``, what is expected rounded in another way, tells how much that is.
    """
    pairs = [(_wide(a), _wide(b)) for a, b in zip(result, expected, strict=True)]
    off = [float((a - b).norm()) for a, b in pairs]
    far = [i for i, (_, b) in enumerate(pairs) if not off[i] <= tolerance * float(b.norm())]
    if not far or again is None:
        return not far
    others = [_wide(t) for t in again()]
    return all(off[i] <= NOISE * float((others[i] - pairs[i][1]).norm()) for i in far)


def nudged(params: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """A nearest point: each entry moved by a rounding error, up or down."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, p in params.items():
        signs = 2 * torch.randint(2, p.shape, generator=generator) - 1
        moved[name] = p.detach() * (1 + torch.finfo(p.dtype).eps * signs.to(p))
    return moved


def _wide(tensor: Tensor) -> Tensor:
    """In float64, where squares neither overflow nor vanish."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))
