"""Simplifying: a graph that is linear in some of its inputs, rewritten to do less for each of them."""

from __future__ import annotations

from typing import Any

from torch import fx

from .rules import ELEMENTWISE, RULES, THROUGH
from .sums import Sum, Value, Writer, aten, map_values


def simplify(graph_module: fx.GraphModule, n_fixed: int) -> fx.GraphModule:
    """The same function with less to do for each new v.

    The placeholders after the first ``n_fixed`` are v, in which the graph is linear. So whatever
    element-wise arithmetic v meets is a weighted sum with weights that do not depend on v. Chains
    of such arithmetic are kept as sums while the graph is walked, their weights multiplied and
    added up among themselves (once per point, not once per product), and written out only where
    something else than element-wise arithmetic reads them. On the way common subexpressions are
    merged, transposes and reshapes cancelled, copies dropped.
    """
    if any(node.target is aten.as_strided.default for node in graph_module.graph.nodes):
        return graph_module  # it reads memory as the original laid it out
    graph = _Walk(graph_module, n_fixed).run()
    graph.eliminate_dead_code()
    return fx.GraphModule(graph_module, graph)


class _Walk:
    """Reads the old graph once and writes the new one."""

    def __init__(self, graph_module: fx.GraphModule, n_fixed: int) -> None:
        self._old = graph_module
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        self._mode = placeholders[0].meta["val"].fake_mode
        self._writer = Writer(fx.Graph(graph_module), self._mode)
        self._values: dict[fx.Node, Value] = {}
        for node in placeholders:
            self._values[node] = self._writer.graph.node_copy(node)
        self._writer.varying.update(self._values[node] for node in placeholders[n_fixed:])  # type: ignore[misc]

    def run(self) -> fx.Graph:
        for node in self._old.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)  # type: ignore[arg-type]
            if node.op == "call_function":
                self._values[node] = self._settled(node, self._rewritten(node, args, kwargs))
            elif node.op == "get_attr":
                self._values[node] = self._captured(node)
            elif node.op == "output":
                self._writer.graph.output(map_values(args, self._writer.written)[0])
        return self._writer.graph

    def _rewritten(self, node: fx.Node, args: Any, kwargs: Any) -> Value:
        value: Value | None = None
        if self._writer.varies((args, kwargs)):
            rule = RULES.get(node.target)
            value = None if rule is None else rule(self._writer, node, *args, **kwargs)
        elif node.target in (aten.alias.default, aten.detach.default):
            value = args[0]
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            value = self._writer.call(aten.reshape.default, *args)  # whatever the strides are now
        if value is None:
            args, kwargs = map_values((args, kwargs), self._writer.written)
            value = self._writer.copy(node, args, kwargs)
        return value

    def _settled(self, node: fx.Node, value: Value) -> Value:
        """A sum is written out at once where leaving it open would repeat work."""
        if not isinstance(value, Sum):
            return value
        if value.plain is not None:
            return value.plain
        if len(value.terms) > 1:
            repeated = len(node.users) > 1 or any(u.target not in ELEMENTWISE for u in node.users)
        else:
            readers = {user.target for user in node.users} - ELEMENTWISE.keys() - THROUGH.keys()
            repeated = value.terms[0].factor is not None and bool(readers)
        return self._writer.written(value) if repeated else value

    def _captured(self, node: fx.Node) -> fx.Node:
        copy = self._writer.graph.node_copy(node)
        if "val" not in copy.meta:
            copy.meta["val"] = self._mode.from_tensor(getattr(self._old, str(node.target)))
        return copy
