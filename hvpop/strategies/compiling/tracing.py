"""Tracing: a function of tensors written down as a graph of pure ATen operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ... import _torch
from .buffers import undo_writes, writing


class UntraceableError(Exception):
    """The function has no graph that is right for every product; the message says why."""


def trace(fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """``fn(*inputs)`` as a graph of ATen operations that write to none of their arguments.

    Nothing is computed: the inputs stand for shapes, dtypes and strides only. Tensors that ``fn``
    captures (a module's buffers, constants) become attributes of the graph, by reference.

    Raises
    ------
    UntraceableError
        If the graph draws random numbers, or writes to something that outlives one call.
    """
    graph_module = _graph(fn, inputs)
    if not undo_writes(graph_module):
        graph_module = _graph(torch.func.functionalize(graph_module, remove="mutations"), inputs)
    for node in graph_module.graph.nodes:
        if writing(node):
            raise UntraceableError(f"{node.target} writes to an input or to a captured tensor")
        if getattr(node.meta.get("val"), "layout", torch.strided) is not torch.strided:
            raise UntraceableError(f"{node} is {node.meta['val'].layout}")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UntraceableError(f"{node.target} draws random numbers")
    return graph_module


def _graph(fn: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    try:
        make_fx = _torch.make_fx()
    except ImportError as error:
        raise UntraceableError(str(error)) from None
    graph_module: fx.GraphModule = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *inputs
    )
    graph_module.graph.eliminate_dead_code()
    return graph_module
