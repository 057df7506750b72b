"""Writing into buffers that nobody needs any more, for graphs that run operation by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def fuse_additions(graph_module: fx.GraphModule) -> None:
    """``alpha a @ b + beta c`` as the one BLAS call that it is."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor:
            continue
        total, product = node.args
        alpha = node.kwargs.get("alpha", 1)
        fused = _FUSED.get(product.target)
        if fused is None or len(product.users) > 1 or _like(product) != _like(node):
            continue
        scales: dict[str, Any] = {} if alpha == 1 else {"alpha": alpha}
        if total.target is aten.mul.Tensor and len(total.users) == 1:
            whole, beta = total.args
            if isinstance(beta, float):
                total, scales["beta"] = whole, beta
        with graph.inserting_before(node):
            call = graph.call_function(fused, (total, *product.args), scales)
        call.meta = node.meta.copy()
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def reuse_buffers(graph_module: fx.GraphModule) -> None:
    """Element-wise operations and BLAS updates write into an operand that is read there for the last time.

    Only buffers made inside the graph are written to, and only if no view of them is alive.
    """
    graph = graph_module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target not in _IN_PLACE:
            continue
        if node.target is aten.add.Tensor and not _free(node, 0, order) and not node.kwargs:
            node.args = node.args[::-1]
        if _free(node, 0, order):
            node.target = _IN_PLACE[node.target]
    graph_module.recompile()


def _free(node: fx.Node, position: int, order: dict[fx.Node, int]) -> bool:
    operand = node.args[position]
    if not isinstance(operand, fx.Node) or _like(operand) != _like(node) or not _owned(operand):
        return False
    if any(arg is operand for i, arg in enumerate(node.args) if i != position):
        return False
    readers = [user for user in operand.users if user is not node]
    return all(order[user] < order[node] and user.target in _FRESH for user in readers)


def _owned(node: fx.Node) -> bool:
    """Whether the node's memory was made in the graph and is reached through this node only."""
    if node.target in _FRESH or node.target in _WRITERS:
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) > 1:
        return False
    return node.target in _VIEWS and _owned(source)


def _like(node: fx.Node) -> tuple[Any, ...]:
    val = node.meta["val"]
    return tuple(val.shape), val.dtype, val.device


_FUSED = {aten.mm.default: aten.addmm.default, aten.bmm.default: aten.baddbmm.default}
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.addcmul.default: aten.addcmul_.default,
    aten.addmm.default: aten.addmm_.default,
    aten.baddbmm.default: aten.baddbmm_.default,
    aten.mul.Tensor: aten.mul_.Tensor,
}
_WRITERS = set(_IN_PLACE.values())
# Operations whose result is new memory, whatever their operands are.
_FRESH = {
    aten.bmm.default,
    aten.cat.default,
    aten.convolution.default,
    aten.embedding_dense_backward.default,
    aten.index_select.default,
    aten.mm.default,
    aten.sum.dim_IntList,
} | set(_IN_PLACE)
_VIEWS = {aten.permute.default, aten.reshape.default}
