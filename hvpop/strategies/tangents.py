"""Tangents without a graph of their own, where ``J v`` is wanted beside the graph of the outputs alone.

torch's forward mode differentiates values as it is told, under grad mode: it records how each tangent
is made, and takes formulas that can be differentiated again in place of fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _torch
from ..interception import Table

Op = Callable[..., Any]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """One product of matrices for each tangent, the second added to the first in place."""
    (x, dx), (w, dw), (b, db) = _parts(input, weight, bias)
    if dw is None or w.dim() != 2 or x.dim() < 1:
        return None
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        tangent = rows @ dw.T
        if dx is not None:
            tangent.addmm_(dx.reshape(rows.shape), w.T)
        if db is not None:
            tangent += db
    value = F.linear(x, w, b)
    return _dual(value, tangent.view(value.shape))


def _symmetric(op: Op) -> Op:
    """Of an op whose derivative is a symmetric matrix, as entry by entry: the pull-back pushes, too."""

    def called(input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        ((x, dx),) = _parts(input)
        in_place = kwargs.get("inplace", False) or any(arg is True for arg in args)
        if dx is None or in_place or not x.requires_grad:
            return None
        value: Tensor = op(x, *args, **kwargs)
        return _dual(value, _pulled(value, x, dx)) if value.dtype is x.dtype else None

    return called


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    return _affine(F.layer_norm, (input, weight, bias), normalized_shape, eps, lambda entry: entry)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    axes = [1] * (input.dim() - 2)
    wide = lambda channel: channel.reshape(-1, *axes)  # noqa: E731
    return _affine(F.group_norm, (input, weight, bias), num_groups, eps, wide)


def _affine(
    op: Op,
    given: tuple[Tensor, Tensor | None, Tensor | None],
    groups: Any,
    eps: float,
    wide: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Of a norm with weight and bias: its derivative without them is a symmetric matrix."""
    (x, dx), (w, dw), (b, db) = _parts(*given)
    if dx is None:
        return None
    alone = x.detach().requires_grad_()
    normalized = op(alone, groups, None, None, eps)
    tangent = _pulled(normalized, alone, dx)
    with torch.no_grad():
        if w is not None:
            tangent = tangent * wide(w)
        if dw is not None:
            tangent = tangent.addcmul_(normalized, wide(dw))
        if db is not None:
            tangent = tangent.add_(wide(db))
    return _dual(op(x, groups, w, b, eps), tangent)


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent)
    return dual


def _pulled(value: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.autograd.grad(value, x, dx, retain_graph=True)[0]


def _parts(*given: Tensor | None) -> list[tuple[Any, Tensor | None]]:
    """Value and tangent of each; none where a model's own transform of functions is at work."""
    if _torch.transforms() is not None:
        return [(None, None)] * len(given)
    return [(None, None) if t is None else tuple(forward_ad.unpack_dual(t)) for t in given]


class DifferentiatedInsideError(Exception):
    """A model differentiates what it computes, and tangents without a graph are gone from that."""


def _differentiated(*_: Any, **__: Any) -> None:
    raise DifferentiatedInsideError


TANGENTS: Table = {
    torch.autograd.grad: _differentiated,
    torch.Tensor.backward: _differentiated,
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    **{
        op: _symmetric(op)
        for op in (
            *(F.silu, F.gelu, F.softmax, torch.softmax, torch.Tensor.softmax),
            *(torch.tanh, torch.Tensor.tanh, torch.sigmoid, torch.Tensor.sigmoid),
        )
    },
}
"""Ops by what gives value and tangent; one that is not here goes torch's way."""
