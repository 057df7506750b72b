"""What takes part: how to make products with hvpop, with each of its peers, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from workloads import Workload

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """A way of multiplying, ready for use."""

    vector: Multiply  # (n,) -> (n,)
    columns: Multiply  # (n, k) -> (n, k)
    scipy: Any = None  # the operator as its library gives it to SciPy, if it does
    own: Any = None  # the library's object, for algorithms of the library's


@dataclass(frozen=True)
class Entrant:
    """A name, whether something is kept between products, and how to build it for a workload."""

    name: str
    keeps: bool
    build: Callable[[Workload], Product]
    ours: bool = field(default=False)


def loop(vector: Multiply) -> Multiply:
    """Columns one by one."""

    def columns(V: Tensor) -> Tensor:
        return V.new_empty(V.shape).copy_(_stacked([vector(v) for v in V.T]))

    return columns


def _stacked(products: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(products, dim=1)
