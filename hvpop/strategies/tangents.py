"""Tangents without a graph of their own, where ``J v`` is wanted beside the graph of the outputs alone.

torch's forward mode differentiates values as it is told, under grad mode: it records how each tangent
is made, and takes formulas that can be differentiated again in place of fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..interception import Table


def _apart(op: Callable[..., Any]) -> Callable[..., Tensor | None]:
    """The op twice: for its value with a graph, and for its tangent without; for what is cheap."""

    def called(*args: Any, **kwargs: Any) -> Tensor | None:
        primals = pytree.tree_map(_primal, (args, kwargs))
        with torch.no_grad():
            tangent = forward_ad.unpack_dual(op(*args, **kwargs)).tangent
        value: Tensor = op(*primals[0], **primals[1])
        return value if tangent is None else forward_ad.make_dual(value, tangent)

    return called


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Once for the value and once for each tangent, the second added to the first in place."""
    x, dx = forward_ad.unpack_dual(input)
    w, dw = forward_ad.unpack_dual(weight)
    b, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if dw is None or weight.dim() != 2 or input.dim() < 1:
        return None
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        if dx is not None:
            tangent = torch.mm(dx.reshape(rows.shape), w.T).addmm_(rows, dw.T)
        else:
            tangent = torch.mm(rows, dw.T)
        if db is not None:
            tangent += db
    value = F.linear(x, w, b)
    return forward_ad.make_dual(value, tangent.view(value.shape))


def _primal(thing: Any) -> Any:
    return forward_ad.unpack_dual(thing).primal if isinstance(thing, Tensor) else thing


TANGENTS: Table = {
    F.linear: _linear,
    **{op: _apart(op) for op in (F.silu, F.gelu, F.group_norm, F.layer_norm, F.softmax, torch.tanh)},
}
"""Ops by what gives value and tangent; one that is not here goes torch's way."""
