"""``J`` of a model's outputs read off their graph, node by node: no second graph, and columns at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .base import Params

Maybe = Sequence[Tensor | None]

BLOCK_NUMEL = 2**19
"""So many numbers a node may give for all columns that go through it at once: more leave the cache, and
less is bookkeeping (64-32-10 network, 1437 samples: 0.27 ms a column by 8 and by 12, 0.32 by 2)."""

BLOCK = 16
"""Columns at once, at most: more gain nothing more."""


class UnreadableError(LookupError):
    """A graph has a node in it that is not known here."""


class ByNodes:
    """``J v`` and ``J' s``, of one vector (k None) or of k at once, from the graph of outputs alone.

    A node of the graph is a linear map that is known by what it saved: the same few matrices push
    tangents forward and pull cotangents back, in the layout that products of matrices are fast in,
    and nothing is between them but those products. The engine needs a second graph for ``J v``, and
    for k columns batching rules, which each op has in a layout of its own, or as a loop.

    Raises
    ------
    UnreadableError
        At a node that is not known, or not in this form.
    """

    def __init__(self, outputs: Sequence[Tensor], point: Params) -> None:
        self._point, self._outputs = point, outputs
        self._slots = {id(p): name for name, p in point.items()}
        self._places: dict[Any, int | str | None] = {}  # of what each node gives; None: a constant
        self._steps: list[tuple[_Node, list[int | str | None]]] = []
        self.kinds: set[str] = set()
        self._largest = 1
        self._ends = [self._read(z) for z in outputs]
        self._settle()

    @property
    def reached(self) -> set[str]:
        """The parameters that the outputs depend on."""
        places = [*self._ends, *(place for _, places in self._steps for place in places)]
        return {place for place in places if isinstance(place, str)}

    @property
    def bytes(self) -> int:
        """What is kept beside the graph."""
        return sum(node.bytes for node, _ in self._steps)

    def width(self) -> int:
        """How many columns to take at once."""
        return max(1, min(BLOCK, BLOCK_NUMEL // self._largest))

    def push(self, v: Params, k: int | None = None) -> list[Tensor]:
        """``J v``: a tangent for each output."""
        made: dict[int, Tensor] = {}

        def given(place: int | str | None) -> Tensor | None:
            if place is None:
                return None
            return v[place] if isinstance(place, str) else made[place]

        for i, (node, places) in enumerate(self._steps):
            made[i] = node.push([given(place) for place in places], k)
            for place in self._done[i]:
                del made[place]
        lead = () if k is None else (k,)
        found = [given(end) for end in self._ends]
        return [
            z.new_zeros(lead + z.shape) if t is None else t
            for z, t in zip(self._outputs, found, strict=True)
        ]

    def pull(self, s: Sequence[Tensor], k: int | None = None) -> Params:
        """``J' s``."""
        arrived: dict[int | str, Tensor] = {}

        def add(place: int | str | None, t: Tensor | None) -> None:
            if place is not None and t is not None:
                arrived[place] = arrived[place] + t if place in arrived else t

        for end, t in zip(self._ends, s, strict=True):
            add(end, t)
        for i, (node, places) in reversed(list(enumerate(self._steps))):
            if i in arrived:
                for place, found in zip(places, node.pull(arrived.pop(i), k), strict=True):
                    add(place, found)
        lead = () if k is None else (k,)
        return {
            name: arrived[name] if name in arrived else p.new_zeros(lead + p.shape)
            for name, p in self._point.items()
        }

    def _settle(self) -> None:
        """See which step is the last to need another one's, and which may write over what it is given."""
        last = {place: i for i, (_, places) in enumerate(self._steps) for place in places}
        self._done: list[list[int]] = [[] for _ in self._steps]
        for place, i in last.items():
            if isinstance(place, int) and place not in self._ends:
                self._done[i].append(place)
        uses = Counter(place for _, places in self._steps for place in places)
        uses.update(2 * self._ends)  # of which there may be readers elsewhere
        for node, places in self._steps:
            for place in places:
                if isinstance(place, int) and uses[place] == 1:
                    before = self._steps[place][0]
                    node.overwrites_tangent = before.gives_fresh
                    before.overwrites_cotangent = node.gives_fresh_back

    def _read(self, output: Tensor) -> int | str | None:
        """Append the steps that lead to an output, those that it depends on first."""
        if not output.requires_grad:
            return None
        if output.grad_fn is None:
            return self._slots.get(id(output))
        stack = [(output.grad_fn, output.output_nr)]
        while stack:
            node, index = stack[-1]
            if index != 0:
                raise UnreadableError(f"{node.name()} gives several tensors")
            behind = [(n, i) for n, i in node.next_functions if n is not None]
            waiting = [(n, i) for n, i in behind if n not in self._places]
            if node in self._places:
                stack.pop()
            elif waiting:
                stack += waiting
            else:
                stack.pop()
                self._places[node] = self._step(node)
        return self._places[output.grad_fn]

    def _step(self, node: Any) -> int | str | None:
        if node.name() == "torch::autograd::AccumulateGrad":
            return self._slots.get(id(node.variable))
        places = [None if n is None else self._places[n] for n, _ in node.next_functions]
        if all(place is None for place in places):
            return None
        kind = KINDS.get(node.name())
        if kind is None:
            raise UnreadableError(node.name())
        try:
            made = kind(node, [place is not None for place in places])
            self._largest = max(self._largest, prod(_shape(node)))
        except (AttributeError, RuntimeError) as error:  # another version; written to since
            raise UnreadableError(node.name()) from error
        self.kinds.add(node.name())
        self._steps.append((made, places))
        return len(self._steps) - 1


class _Node(ABC):
    """The derivative of one op: ``push`` from tangents of what it is given, ``pull`` back to them."""

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


class _Product(_Node):
    """``x W``, and a bias if there is one."""

    gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._biased = len(wanted) == 3
        if self._biased and (node._saved_alpha != 1 or node._saved_beta != 1):
            raise UnreadableError("a product with factors")
        self._rows = _shape(node)[0]
        behind = node.next_functions
        if self._biased and wanted[0] and len(_shape(behind[0][0])) != 1:
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
        if (
            self._x is not None
        ):  # transposed, as weights are, that of a matrix product comes in order
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


class _Entries(_Node):
    """An op of each entry by itself."""

    gives_fresh = gives_fresh_back = True

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        meta = node._input_metadata[0]
        one = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
        with torch.no_grad():
            self._slope: Tensor = node(one).detach()
        self.bytes = self._slope.nbytes

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        return t.mul_(self._slope) if self.overwrites_tangent else t * self._slope

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        return (s.mul_(self._slope) if self.overwrites_cotangent else s * self._slope,)


class _View(_Node):
    """The same entries in another shape."""

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        self._shape = _shape(node)
        self._given = tuple(node._saved_self_sym_sizes)

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        return t.reshape(self._shape if k is None else (k, *self._shape))

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        return (s.reshape(self._given if k is None else (k, *self._given)),)


class _Transposed(_Node):
    """A matrix transposed."""

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        if len(_shape(node)) != 2:
            raise UnreadableError("no matrix")

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        (t,) = tangents
        assert t is not None
        return t.mT

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        return (s.mT,)


class _Sum(_Node):
    """Of two tensors of one shape."""

    def __init__(self, node: Any, wanted: list[bool]) -> None:
        shapes = {_shape(n) for (n, _), w in zip(node.next_functions, wanted, strict=True) if w}
        if node._saved_alpha != 1 or shapes != {_shape(node)}:
            raise UnreadableError("a sum that is not of two tensors alike")
        self._wanted = wanted

    def push(self, tangents: Maybe, k: int | None) -> Tensor:
        given = [t for t in tangents if t is not None]
        return given[0] if len(given) == 1 else given[0] + given[1]

    def pull(self, s: Tensor, k: int | None) -> Maybe:
        return [s if wanted else None for wanted in self._wanted]


def _saved(node: Any, name: str) -> Tensor:
    saved = getattr(node, f"_saved_{name}")
    if not isinstance(saved, Tensor):
        raise UnreadableError(f"{node.name()} has not kept what it needs here")
    return saved.detach()


def _shape(node: Any) -> tuple[int, ...]:
    """The shape of what an op gives."""
    if node.name() == "torch::autograd::AccumulateGrad":
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[0].shape)


KINDS: dict[str, type[_Node]] = {
    **dict.fromkeys(("AddmmBackward0", "MmBackward0"), _Product),
    **dict.fromkeys(
        ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"),
        _View,
    ),
    "TBackward0": _Transposed,
    "AddBackward0": _Sum,
    **{
        f"{op}Backward0": _Entries
        for op in (
            *("Tanh", "Sigmoid", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish"),
            *("Softplus", "Hardtanh", "Hardswish", "Hardsigmoid", "Exp"),
        )
    },
}
"""Nodes by what their op is."""
