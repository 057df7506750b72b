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


def identified(A: LinearOperator) -> tuple[list[Any], list[Tensor]]:
    """How ``A`` is put together, and the products, whole, ``(m,)`` on the host, of its parts with fixed signs."""
    found: dict[int, list[Tensor]] = {}
    counters: dict[int, set[str]] = {}
    _multiply(A, found, counters)
    products = [product.clone() for kept in found.values() for product in kept]
    return _structure(A, counters), products


def _structure(A: LinearOperator, counters: dict[int, set[str]]) -> list[Any]:
    """Nested lists of names, sizes and numbers.

    A part that is made of no others counts by its size alone: the same matrix may be held in several ways.
    """
    children = A._children()
    if not children:
        return list(A.shape)
    left_out = counters.get(id(A), set())
    numbers = [f"{name}={value!r}" for name, value in _numbers(A).items() if name not in left_out]
    return [type(A).__name__, *numbers, *(_structure(part, counters) for part in children)]


def _numbers(A: LinearOperator) -> dict[str, float]:
    """Those among the attributes of a composite."""
    return {
        name: value
        for name, value in sorted(vars(A).items())
        if not name.startswith("_") and isinstance(value, int | float) and name != "symmetric"
    }


def _multiply(
    A: LinearOperator, found: dict[int, list[Tensor]], counters: dict[int, set[str]]
) -> None:
    """Fill in the products of each part and each damping; none is multiplied twice.

    Taken apart, a small term is seen beside a large one. What parts and numbers do not tell is
    multiplied as a whole as well; of its numbers those that a product changes are no part of the matrix.
    """
    if id(A) in found:
        return
    children = A._children()
    found[id(A)] = []
    if not children:
        found[id(A)] = [_product(A)]
    elif isinstance(A, Measured):
        _ = A @ _probe(A)  # its unit is that of its first product: the same in every run
    elif isinstance(A, Damped):
        damping = A.damping(_probe(A)).expand(A.held[0], 1)
        found[id(A)] = [A.space.whole(damping)[:, 0].cpu()]
    if children and not A._is_by_parts():
        before = _numbers(A)
        found[id(A)].append(_product(A))
        counters[id(A)] = {n for n, value in _numbers(A).items() if before.get(n) != value}
    for child in children:
        _multiply(child, found, counters)


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


def _product(A: LinearOperator) -> Tensor:
    return A.space.whole(A @ _probe(A))[:, 0].cpu()


def _probe(A: LinearOperator) -> Tensor:
    return _signs(A.space)


def _signs(space: Space) -> Tensor:
    return probes.signs(space, 1, "checkpoint")
