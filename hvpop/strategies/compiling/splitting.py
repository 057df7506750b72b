"""Splitting: one graph into what is computed once per point and what is computed once per product."""

from __future__ import annotations

from torch import fx


def split(graph_module: fx.GraphModule, n_fixed: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """``f(x, v)`` as ``product(residuals, v)`` with ``residuals = prepare(x)``.

    Everything that a placeholder after the first ``n_fixed`` reaches is computed per product; what
    the rest hands over to it are the residuals.
    """
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    varying = set(placeholders[n_fixed:])
    for node in graph.nodes:
        if node.op != "output" and not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    frontier = {
        source: None
        for node in graph.nodes
        if node in varying or node.op == "output"
        for source in node.all_input_nodes
        if source not in varying
    }
    return _prepare(graph_module, varying, list(frontier)), _product(
        graph_module, varying, list(frontier), placeholders[n_fixed:]
    )


def _prepare(
    graph_module: fx.GraphModule, varying: set[fx.Node], frontier: list[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node.op != "output" and node not in varying:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in frontier))
    graph.eliminate_dead_code()
    return fx.GraphModule(graph_module, graph)


def _product(
    graph_module: fx.GraphModule,
    varying: set[fx.Node],
    frontier: list[fx.Node],
    directions: list[fx.Node],
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in [*frontier, *directions]:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = node.meta.copy()
    for node in graph_module.graph.nodes:
        if node in varying and node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
    return fx.GraphModule(graph_module, graph)
