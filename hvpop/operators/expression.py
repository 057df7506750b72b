"""What tells two operators apart though their matrices are close: how they are made, and of which parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import probes
from .base import LinearOperator
from .damped import Damped
from .measured import Measured
from .space import Space


def structure(A: LinearOperator) -> list[Any]:
    """How ``A`` is put together: nested lists of names, sizes and numbers.

    A part that is made of no others counts by its size alone: the same matrix may be held in several ways.
    """
    children = A._children()
    if not children:
        return list(A.shape)
    numbers = [
        f"{name}={value!r}"
        for name, value in sorted(vars(A).items())
        if not name.startswith("_") and isinstance(value, int | float) and name != "symmetric"
    ]
    return [type(A).__name__, *numbers, *(structure(part) for part in children)]


def products(A: LinearOperator) -> list[Tensor]:
    """Those of each part and each damping with a fixed vector of signs, whole, ``(m,)`` on the host.

    Taken apart, a small term is seen beside a large one. No part is multiplied twice.
    """
    found: dict[int, list[Tensor]] = {}

    def visit(part: LinearOperator) -> None:
        if id(part) in found:
            return
        children = part._children()
        found[id(part)] = []
        if not children:
            found[id(part)] = [part.space.whole(part @ _probe(part))[:, 0].cpu()]
        elif isinstance(part, Measured):
            _ = part @ _probe(part)  # its unit is that of its first product: the same in every run
        elif isinstance(part, Damped):
            damping = part.damping(_probe(part)).expand(part.held[0], 1)
            found[id(part)] = [part.space.whole(damping)[:, 0].cpu()]
        for child in children:
            visit(child)

    visit(A)
    return [product.clone() for kept in found.values() for product in kept]


def _leaves(A: LinearOperator) -> list[LinearOperator]:
    """The parts that are made of no others, each once."""
    children = A._children()
    found = [leaf for part in children for leaf in _leaves(part)] if children else [A]
    return list({id(leaf): leaf for leaf in found}.values())


def uses(A: LinearOperator) -> list[int]:
    """What each part says of how much it was used, where that decides how it multiplies."""
    return [part._uses() for part in _leaves(A)]


def used(A: LinearOperator, counts: list[int]) -> None:
    """Let the parts go on as if they had been used so much."""
    for part, count in zip(_leaves(A), counts, strict=True):
        part._uses(count)


def difference(one: Tensor, other: Tensor) -> float:
    """How far two products with the probe are apart, relative to them; 0 if by rounding alone.

    Rounding differs between machines and thread counts, but not along the probe: a shift of the diagonal
    is seen there long before it is seen in the norm.
    """
    a, b = one.double(), other.double()
    if a.shape != b.shape:
        return torch.inf
    size = max(float(a.abs().max()), float(b.abs().max())) or 1.0  # keeps squares within range
    a, b = a / size, b / size
    eps, n = torch.finfo(one.dtype).eps, a.shape[0]
    space = Space(n, torch.float64, torch.device("cpu"))
    both = torch.stack([a, b, a - b], 1)
    norm, apart = float(space.norms(both)[:2].max()), float(space.norms(both)[2])
    form, along = space.inner(_signs(space), both)[0, 1:].abs().tolist()
    rounding = 1e3 * eps * norm, eps * (300 * norm + 30 * form)
    same = apart <= rounding[0] and along <= rounding[1]
    return 0.0 if same else apart / norm


def _probe(A: LinearOperator) -> Tensor:
    return _signs(A.space)


def _signs(space: Space) -> Tensor:
    return probes.signs(space, 1, "checkpoint")
