"""Ops as linear maps, read off the nodes of an autograd graph: what pushes tangents, and its transpose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .. import _torch

Maybe = Sequence[Tensor | None]


class UnreadableError(LookupError):
    """A graph has a node in it that is not known here."""


class Node(ABC):
    """The derivative of one op: ``push`` from tangents of what it is given, ``pull`` back to them."""

    alone = False
    """Whether it takes one vector only (k is None)."""

    once = False
    """Whether it serves one product, and what only many gain by is not to be made."""

    bytes = 0
    """What it keeps that the graph does not."""

    gives_fresh = gives_fresh_back = False
    """Whether what it gives, by ``push`` and by ``pull``, is nobody else's."""

    overwrites_tangent = overwrites_cotangent = False
    """Whether nobody else reads what it is given."""

    @abstractmethod
    def __init__(self, node: Any, wanted: list[bool]) -> None: ...

    @abstractmethod
    def push(self, tangents: Maybe, k: int | None) -> Tensor: ...

    @abstractmethod
    def pull(self, s: Tensor, k: int | None) -> Maybe: ...


class Product(Node):
    """``x W``, and a bias if there is one."""

    gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._biased = len(wanted) == 3
        if self._biased and (node._saved_alpha != 1 or node._saved_beta != 1):
            raise UnreadableError("a product with factors")
        self._rows = shape_of(node)[0]
        behind = node.next_functions
        if self._biased and wanted[0] and len(shape_of(behind[0][0])) != 1:
            raise UnreadableError("a bias for each sample")
        self._of_bias, of_x, of_w = wanted if self._biased else (False, *wanted)
        self.gives_fresh = of_x or of_w
        self._x = _saved(node, "mat1" if self._biased else "self") if of_w else None
        self._w = _saved(node, "mat2") if of_x else None

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        db, dx, dw = tangents if self._biased else (None, *tangents)
        made = None if db is None else db.unsqueeze(-2)
        if self._x is not None and dw is not None:
            made = _multiplied(self._x, dw, made)
        if self._w is None or dx is None:
            assert made is not None
            return made.expand(*made.shape[:-2], self._rows, -1)  # be it the bias alone
        rows = dx.reshape(-1, dx.shape[-1])
        if dw is not None and made is not None and made.is_contiguous():
            made.view(-1, made.shape[-1]).addmm_(rows, self._w)
            return made
        pushed = (rows @ self._w).view(*dx.shape[:-1], -1)
        return pushed if made is None else pushed.add_(made)

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        of_x = of_w = None
        if self._w is not None:
            of_x = (s.reshape(-1, s.shape[-1]) @ self._w.T).view(*s.shape[:-1], -1)
        if self._x is not None:  # made transposed, as weights are used, so that it comes in order
            x = self._x if k is None else self._x.expand(k, -1, -1)
            of_w = (s.mT @ x).mT
        if not self._biased:
            return of_x, of_w
        return (s.sum(-2) if self._of_bias else None), of_x, of_w


def _multiplied(x: Tensor, dw: Tensor, bias: Tensor | None) -> Tensor:
    if dw.dim() == 2:
        return x @ dw if bias is None else torch.addmm(bias, x, dw)
    x = x.expand(dw.shape[0], -1, -1)
    return torch.bmm(x, dw) if bias is None else torch.baddbmm(bias, x, dw)


class Entries(Node):
    """An op of each entry by itself."""

    gives_fresh = gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._node = node
        self.bytes = prod(shape_of(node)) * node._input_metadata[0].dtype.itemsize

    @cached_property
    def slope(self) -> Tensor:
        """What entries are multiplied by."""
        meta = self._node._input_metadata[0]
        one = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
        return self._passed(one)

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        return self._times(t, k, self.overwrites_tangent)

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        return (self._times(s, k, self.overwrites_cotangent),)

    def _times(self, t: Tensor, k: int | None, over: bool) -> Tensor:
        if self.once and k is None:
            return self._passed(t)
        return t.mul_(self.slope) if over else t * self.slope

    def _passed(self, t: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self._node(t)
        return found.detach()


class OwnEntries(Entries):
    """The same, by a Function of hvpop's."""

    def _passed(self, t: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = _torch.function_of(self._node).backward(self._node, t)[0]
        return found


class View(Node):
    """The same entries in another shape."""

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._shape = shape_of(node)
        self._given = tuple(node._saved_self_sym_sizes)

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        return t.reshape(self._shape if k is None else (k, *self._shape))

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        return (s.reshape(self._given if k is None else (k, *self._given)),)


class Transposed(Node):
    """A matrix transposed."""

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        if len(shape_of(node)) != 2:
            raise UnreadableError("no matrix")

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        return t.mT

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        return (s.mT,)


class Sum(Node):
    """Of two tensors, each as large as the sum or repeated along some dimensions."""

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._shape, self._wanted = shape_of(node), wanted
        self._repeated: list[list[int]] = []
        for (behind, _), asked in zip(node.next_functions, wanted, strict=True):
            shape = shape_of(behind) if asked else self._shape
            if node._saved_alpha != 1 or len(shape) != len(self._shape):
                raise UnreadableError("a sum with factors, or of tensors unlike in rank")
            rank = len(shape)
            self._repeated.append(
                [d - rank for d in range(rank) if shape[d] == 1 and self._shape[d] != 1]
            )

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        given = [t for t in tangents if t is not None]
        if len(given) == 2:
            return given[0] + given[1]
        return given[0].expand(self._shape if k is None else (k, *self._shape))

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        pairs = zip(self._repeated, self._wanted, strict=True)
        return [
            None if not wanted else s.sum(axes, keepdim=True) if axes else s
            for axes, wanted in pairs
        ]


class Own(Node):
    """A Function of hvpop's, which says both ways itself."""

    alone = gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._node, self._function = node, _torch.function_of(node)

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        with torch.no_grad():
            made: Tensor = self._function.jvp(self._node, *tangents)
        return made

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        with torch.no_grad():
            found: Maybe = self._function.backward(self._node, s)
        return found[: len(self._node.next_functions)]  # of tensors, which come first


class Convolution(Node):
    """Of any dimension, transposed or not. Columns gain nothing from going together here."""

    alone = gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._wanted, self._shape = wanted, shape_of(node)
        self._x, self._w = _saved(node, "input"), _saved(node, "weight")
        self.gives_fresh = wanted[0] or wanted[1]
        self._options: list[Any] = [
            [int(i) for i in node._saved_stride],
            [int(i) for i in node._saved_padding],
            [int(i) for i in node._saved_dilation],
            bool(node._saved_transposed),
            [int(i) for i in node._saved_output_padding],
            int(node._saved_groups),
        ]

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        dx, dw, db = tangents
        made = None
        if dw is not None:
            made = torch.convolution(self._x, dw, db, *self._options)
        if dx is not None:
            bias = db if dw is None else None
            pushed = torch.convolution(dx, self._w, bias, *self._options)
            made = pushed if made is None else made.add_(pushed)
        if made is None:
            assert db is not None
            made = db.view(-1, *[1] * (len(self._shape) - 2)).expand(self._shape)
        return made

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        sizes = [self._shape[1]] if self._wanted[2] else None
        found: Maybe = torch.ops.aten.convolution_backward(
            s, self._x, self._w, sizes, *self._options, self._wanted
        )
        return found


class GroupNorm(Node):
    """A derivative that is a symmetric matrix, and weights that multiply channels."""

    alone = gives_fresh = gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._wanted = wanted
        self._x = _saved(node, "input").contiguous()
        self._mean, self._scale = _saved(node, "result1"), _saved(node, "result2")
        weight = node._saved_weight
        self._w = None if weight is None else weight.detach()
        self._sizes = [int(getattr(node, f"_saved_{name}")) for name in ("N", "C", "HxW", "group")]
        self._channels = (-1, *[1] * (self._x.dim() - 2))

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        dx, dw, db = tangents
        made = torch.zeros_like(self._x)
        if dx is not None:
            made, _, _ = self._back(dx, None, [True, False, False])
            if self._w is not None:
                made = made.mul_(self._w.view(self._channels))
        if dw is not None:
            made = made.addcmul_(self._normalized(), dw.view(self._channels))
        return made if db is None else made.add_(db.view(self._channels))

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        found: Maybe = self._back(s, self._w, self._wanted)
        return found

    def _normalized(self) -> Tensor:
        groups = self._x.view(*self._mean.shape, -1)
        made = (groups - self._mean[..., None]).mul_(self._scale[..., None])
        return made.view_as(self._x)

    def _back(self, s: Tensor, w: Tensor | None, wanted: list[bool]) -> Any:
        return torch.ops.aten.native_group_norm_backward(
            s.contiguous(), self._x, self._mean, self._scale, w, *self._sizes, wanted
        )


class Mean(Node):
    """Over some dimensions."""

    gives_fresh = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._given = tuple(int(n) for n in node._saved_self_sym_sizes)
        rank = len(self._given)
        axes = [int(d) - 2**64 if int(d) >= 2**63 else int(d) for d in node._saved_dim]
        self._axes = sorted(d - rank if d >= 0 else d for d in axes) or list(range(-rank, 0))
        self._keeps = bool(node._saved_keepdim)

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        return t.mean(self._axes, self._keeps)

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        if not self._keeps:
            for axis in reversed(self._axes):  # the last first: others are counted from the end
                s = s.unsqueeze(axis)
        s = s / prod(self._given[axis] for axis in self._axes)
        return (s.expand(self._given if k is None else (k, *self._given)),)


class MaxPool(Node):
    """The largest entry of each window, which stays the same one."""

    gives_fresh = gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._places = _saved(node, "result1").flatten(-2)
        self._shape, self._given = shape_of(node), tuple(node._saved_self.shape)

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        lead = () if k is None else (k,)
        places = self._places.expand(*lead, *self._places.shape)
        return t.flatten(-2).gather(-1, places).view(*lead, *self._shape)

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        lead = () if k is None else (k,)
        places = self._places.expand(*lead, *self._places.shape)
        found = s.new_zeros(*lead, *self._given)
        found.flatten(-2).scatter_add_(-1, places, s.flatten(-2))
        return (found,)


def _saved(node: Any, name: str) -> Tensor:
    saved = getattr(node, f"_saved_{name}")
    if not isinstance(saved, Tensor):
        raise UnreadableError(f"{node.name()} has not kept what it needs here")
    return saved.detach()


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of what an op gives."""
    if node.name() == "torch::autograd::AccumulateGrad":
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[0].shape)


def kind_of(node: Any) -> type[Node]:
    """What reads a node."""
    kind: type[Node] | None = KINDS.get(node.name())
    if isinstance(node, BackwardCFunction):
        function = _torch.function_of(node)
        says = vars(function) if function.__module__.startswith("hvpop.") else {}
        kind = OwnEntries if "entrywise" in says else Own if "jvp" in says else None
    if kind is None:
        raise UnreadableError(node.name())
    return kind


KINDS: dict[str, type[Node]] = {
    **dict.fromkeys(("AddmmBackward0", "MmBackward0"), Product),
    **dict.fromkeys(
        ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"),
        View,
    ),
    "TBackward0": Transposed,
    "AddBackward0": Sum,
    "ConvolutionBackward0": Convolution,
    "NativeGroupNormBackward0": GroupNorm,
    "MeanBackward1": Mean,
    "MaxPool2DWithIndicesBackward0": MaxPool,
    **{
        f"{op}Backward0": Entries
        for op in (
            *("Tanh", "Sigmoid", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish"),
            *("Softplus", "Hardtanh", "Hardswish", "Hardsigmoid", "Exp"),
        )
    },
}
"""Nodes by what their op is."""
