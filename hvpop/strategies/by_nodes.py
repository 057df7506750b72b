"""``J`` of a model's outputs read off their graph, node by node: no second graph, and columns at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from .base import Params
from .nodes import Node, UnreadableError, kind_of, shape_of

BLOCK_NUMEL = 2**19
"""So many numbers a node may give for all columns that go through it at once: more leave the cache, and
less is bookkeeping (64-32-10 network, 1437 samples: 0.27 ms a column by 8 and by 12, 0.32 by 2)."""

BLOCK = 16
"""Columns at once, at most: more gain nothing more."""


class ByNodes:
    """``J v`` and ``J' s``, of one vector (k None) or of k at once, from the graph of outputs alone.

    A node of the graph is a linear map that is known by what it saved: the same few matrices push
    tangents forward and pull cotangents back, in the layout that products of matrices are fast in,
    and nothing is between them but those products. The engine needs a second graph for ``J v``, and
    for k columns batching rules, which each op has in a layout of its own, or as a loop.

    Parameters
    ----------
    outputs, point
        Of a function, with the graph between them.
    once
        Whether it is for a single product, for which nothing is to be made ready.

    Raises
    ------
    UnreadableError
        At a node that is not known, or not in this form.
    """

    def __init__(self, outputs: Sequence[Tensor], point: Params, *, once: bool = False) -> None:
        self._point, self._outputs, self._once = point, outputs, once
        self._slots = {id(p): name for name, p in point.items()}
        self._places: dict[Any, int | str | None] = {}  # of what each node gives; None: a constant
        self._steps: list[tuple[Node, list[int | str | None]]] = []
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
    def alone(self) -> bool:
        """Whether columns go one by one, and there is something that a trace can simplify."""
        return any(node.alone for node, _ in self._steps)

    @property
    def bytes(self) -> int:
        """What is kept beside the graph."""
        return sum(node.bytes for node, _ in self._steps)

    def width(self) -> int:
        """How many columns to take at once."""
        if self.alone:
            return 1
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
        kind = kind_of(node)
        try:
            made = kind(node, [place is not None for place in places])
            self._largest = max(self._largest, prod(shape_of(node)))
            made.once = self._once
        except (AttributeError, RuntimeError) as error:  # another version; written to since
            raise UnreadableError(node.name()) from error
        self.kinds.add(node.name())
        self._steps.append((made, places))
        return len(self._steps) - 1
