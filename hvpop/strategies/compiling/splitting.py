"""Splitting: one graph into what is computed once per point and what is computed once per product."""

from __future__ import annotations

import torch
from torch import fx

from .buffers import owned
from .sums import args_of, aten


def split(graph_module: fx.GraphModule, n_fixed: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """``f(x, v)`` as ``product(*residuals, *v)`` with ``residuals = prepare(*x)``.

    Everything that a placeholder after the first ``n_fixed`` reaches is computed per product; what
    the rest hands over to it are the residuals. Results are new tensors, each with its own memory.
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
    prepare.output(tuple(copies[node] for node in residuals))
    prepare.eliminate_dead_code()

    product = fx.Graph()
    copies = {}
    for node in [*residuals, *inputs[n_fixed:]]:
        copies[node] = product.placeholder(node.name)
        copies[node].meta = node.meta.copy()
    for node in nodes:
        if node in varying and node not in copies:
            copies[node] = product.node_copy(node, copies.__getitem__)
    results = [copies[node] for node in args_of(output)[0]]
    product.output(tuple(_own(product, result, results) for result in results))
    return fx.GraphModule(graph_module, prepare), fx.GraphModule(graph_module, product)


def _own(graph: fx.Graph, result: fx.Node, results: list[fx.Node]) -> fx.Node:
    """The result itself, or a copy where it might share memory with something else."""
    if owned(result) and results.count(result) == 1:
        return result
    copy = graph.call_function(
        aten.clone.default, (result,), {"memory_format": torch.contiguous_format}
    )
    copy.meta = result.meta.copy()
    return copy
