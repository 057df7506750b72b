"""From flat columns to dicts of parameters and back, and weighted sums of products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from .. import _torch
from ..operators import Layout, crossing
from ..operators.crossing import working_dtype
from ..operators.space import powers
from ..strategies import LinearMap, Params


class WeightedSum:
    """``sum_b w_b x_b`` and ``sum_b w_b``, accumulated together and divided at the end."""

    def __init__(self, normalized: bool) -> None:
        self._normalized = normalized
        self._first: list[Tensor] = []  # as it came: the average of a single term is that term
        self._sum: list[Tensor] = []
        self._unit = 1.0  # what the sum is to be multiplied by, the first weight
        self._weight = 0.0

    def add(self, tensors: list[Tensor], weight: float) -> None:
        """Add one term; tensors may be half precision, sums are not. They are kept, not changed."""
        if any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors):
            tensors = [t.to(working_dtype(t.dtype)) for t in tensors]
        if self._sum:
            _torch.foreach_add_(self._sum, tensors, alpha=weight / self._unit)
        elif self._first:
            if self._weight == 0.0:
                self._first = list(_torch.foreach_mul(self._first, 0.0))
            else:
                self._unit = self._weight
            self._sum = list(_torch.foreach_add(self._first, tensors, alpha=weight / self._unit))
            self._first = []
        else:
            self._first = tensors
        self._weight += weight

    @property
    def weight(self) -> float:
        """``sum_b w_b``."""
        return self._weight

    def undivided(self) -> tuple[list[Tensor], float]:
        """``sum_b w_b x_b``, as tensors and a number that they are to be multiplied by."""
        return (self._first, self._weight) if self._first else (self._sum, self._unit)

    def result(self) -> list[Tensor]:
        """The average, or the sum if it is not normalized."""
        if self._normalized and self._weight == 0.0:
            raise ValueError("all batches have weight 0, so their average is not defined")
        tensors, factor = self.undivided()
        if self._normalized:
            factor /= self._weight
        if factor == 1.0:
            return tensors
        if self._first:
            return list(_torch.foreach_mul(tensors, factor))
        self._unit /= factor
        _torch.foreach_mul_(tensors, factor)
        return tensors


def layout_of(point: Params) -> Layout:
    """Names and shapes of the parameters, in order."""
    return Layout(tuple(point), tuple(p.shape for p in point.values()))


def space_of(point: Params) -> tuple[torch.dtype, torch.device]:
    """The one dtype and device of the flat vectors over parameters that may differ in both."""
    dtype = next(iter(point.values())).dtype
    require_plain(point)
    for name, parameter in point.items():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name} has no shape yet; run the model on one batch first")
        if parameter.is_complex():
            raise TypeError(
                f"parameter {name} is complex ({parameter.dtype}); hvpop works with real parameters: "
                "hold its torch.view_as_real(...) and combine the parts in the forward pass"
            )
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype, next(iter(point.values())).device


def require_plain(point: Params) -> None:
    """Refuse what only looks like a tensor of its shape: before anything of the model's runs."""
    for name, parameter in point.items():
        if type(parameter.data) is not Tensor:
            raise TypeError(
                f"parameter {name} is a {type(parameter.data).__name__}; sharded and other tensor "
                "subclasses are not supported: gather them into plain tensors first (those of FSDP2 by "
                "`with hvpop.distributed.gathered(model):`), or multiply in parts by differences of "
                "gradients, hvpop.distributed.ShardedModelHessian(risk, FiniteDifference())"
            )


def to_point(V: Tensor, layout: Layout, point: Params) -> Params:
    """Columns ``(n, k)`` as tensors ``(k, *shape)`` in each parameter's dtype and device."""
    pieces = layout.unflatten(V.T.contiguous())
    return {name: _like(piece, point[name]) for name, piece in pieces.items()}


def from_point(products: list[Tensor], V: Tensor) -> Tensor:
    """The inverse of `to_point`, in the dtype and device of ``V``."""
    k = V.shape[1]
    pieces = [_like(p.reshape(k, -1), V) for p in products]
    if any(p.requires_grad for p in pieces):  # autograd goes through it
        return torch.cat(pieces, dim=1).T
    # of a rectangular matrix products are not as long as vectors
    rows = crossing.empty((k, sum(p.shape[1] for p in pieces)), V.dtype, V.device)
    return torch.cat(pieces, dim=1, out=rows).T


def scale_of(V: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor | None:
    """Powers of two ``(k,)`` as large as the columns, if some parameter is float16: it ends at 65504."""
    if torch.float16 not in dtypes:
        return None
    return powers(V.abs().amax(0))


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``x.to(other)``, which takes torch a while to find that it has nothing to do."""
    return x if x.dtype == other.dtype and x.device == other.device else x.to(other)


def columns_in(columns: Params) -> int:
    """How many columns a dict of tensors ``(k, *shape)`` stands for."""
    return next(iter(columns.values())).shape[0]


class Multiply(Protocol):
    """A map times some columns, at most ``width`` of them at once."""

    def __call__(self, linear: LinearMap, width: int = ...) -> list[Tensor]: ...


def multiplier(columns: Params) -> Multiply:
    """What multiplies a map by some columns; a single one goes the strategies' shorter way."""
    k = columns_in(columns)
    if k == 1:
        v = {name: column[0] for name, column in columns.items()}
        return lambda linear, width=1: list(linear(v).values())

    def multiply(linear: LinearMap, width: int = k) -> list[Tensor]:
        if width >= k:
            return list(linear.columns(columns).values())
        blocks = [
            linear.columns({name: c[start : start + width] for name, c in columns.items()})
            for start in range(0, k, width)
        ]
        return [torch.cat([block[name] for block in blocks]) for name in blocks[0]]

    return multiply
