"""Splitting: one graph into what is computed once per point and what is computed once per product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .buffers import ELEMENTWISE, owned
from .sums import args_of, aten


def split(graph_module: fx.GraphModule, n_fixed: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """``f(x, v)`` as ``product(*residuals, *v)`` with ``residuals = prepare(*x)``.

    Everything that a placeholder after the first ``n_fixed`` reaches is computed per product; what
    the rest hands over to it are the residuals, laid out as what they are combined with. Results are new tensors,
    each with its own memory.
    """
    nodes = list(graph_module.graph.nodes)
    *inputs, output = [node for node in nodes if node.op in ("placeholder", "output")]
    varying = set(inputs[n_fixed:])
    for node in nodes:
        if node is not output and not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    readers = [node for node in nodes if node in varying or node is output]
    frontier = {x: None for node in readers for x in node.all_input_nodes if x not in varying}
    residuals = list(frontier)

    prepare = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in varying and node is not output:
            copies[node] = prepare.node_copy(node, copies.__getitem__)
    laid_out = {
        node: _laid_out(prepare, copies[node], _order_of_readers(node, varying))
        for node in residuals
    }
    prepare.output(tuple(laid_out.values()))
    prepare.eliminate_dead_code()

    product = fx.Graph()
    copies = {}
    for node in [*residuals, *inputs[n_fixed:]]:
        copies[node] = product.placeholder(node.name)
        copies[node].meta = laid_out.get(node, node).meta.copy()
    for node in nodes:
        if node in varying and node not in copies:
            copies[node] = product.node_copy(node, copies.__getitem__)
    results = [copies[node] for node in args_of(output)[0]]
    product.output(tuple(_own(product, result, results) for result in results))
    return fx.GraphModule(graph_module, prepare), fx.GraphModule(graph_module, product)


def _order_of_readers(residual: fx.Node, varying: set[fx.Node]) -> tuple[int, ...] | None:
    """The order of axes in memory that all that reads the residual shares, if that is another one than its own.

    Element by element, tensors that lie in different orders take several times as long as in one.
    """
    if not owned(residual):
        return None  # a copy would be kept beside what it is a view of
    orders: set[tuple[int, ...]] = set()
    for reader in residual.users:
        if reader not in varying:
            continue
        others = [
            a
            for a in reader.all_input_nodes
            if a in varying and a.meta["val"].shape == residual.meta["val"].shape
        ]
        if reader.target not in ELEMENTWISE or not others:
            return None
        orders.update(_order(a.meta["val"]) for a in others)
    own = _order(residual.meta["val"])
    return orders.pop() if len(orders) == 1 and own not in orders else None


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The axes from the one that moves slowest through memory on."""
    return tuple(sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True))


def _laid_out(graph: fx.Graph, node: fx.Node, order: tuple[int, ...] | None) -> fx.Node:
    """A copy whose axes come in an order in memory."""
    if order is None:
        return node
    back = sorted(range(len(order)), key=order.__getitem__)
    steps: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.permute.default, (list(order),)),
        (aten.contiguous.default, ()),
        (aten.permute.default, (back,)),
    ]
    for target, args in steps:
        value = node.meta["val"]
        node = graph.call_function(target, (node, *args))
        with value.fake_mode:
            node.meta["val"] = target(value, *args)
    return node


def _own(graph: fx.Graph, result: fx.Node, results: list[fx.Node]) -> fx.Node:
    """The result itself, or a copy where it might share memory with something else."""
    if owned(result) and results.count(result) == 1:
        return result
    copy = graph.call_function(
        aten.clone.default, (result,), {"memory_format": torch.contiguous_format}
    )
    copy.meta = result.meta.copy()
    return copy
