"""Fewer calls and buffers, for graphs that run operation by operation."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .sums import args_of, aten


def fuse_additions(graph_module: fx.GraphModule) -> None:
    """``beta c + alpha A B`` as the one BLAS call that it is."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        total, product = args_of(node)
        fused = _FUSED.get(product.target)
        if fused is None or len(product.users) > 1 or _like(product) != _like(node):
            continue
        scales = dict(node.kwargs)
        if total.target is aten.mul.Tensor and len(total.users) == 1:
            whole, beta = args_of(total)
            if isinstance(beta, float):
                total, scales["beta"] = whole, beta
        with graph.inserting_before(node):
            call = graph.call_function(fused, (total, *product.args), scales)
        call.meta = node.meta.copy()
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def spell_out_scales(graph_module: fx.GraphModule) -> None:
    """``add(a, b, alpha=c)`` as ``a + c b``.

    Inductor (torch 2.13) loses alpha where b is a matrix product: ``torch.add(c, a @ b, alpha=0.5)``
    compiles to ``c + a @ b``.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if "alpha" in node.kwargs:
            a, b = args_of(node)
            with graph.inserting_before(node):
                scaled = graph.call_function(aten.mul.Tensor, (b, node.kwargs["alpha"]))
            scaled.meta = b.meta.copy()
            node.args, node.kwargs = (a, scaled), {}
    graph_module.recompile()


def reuse_buffers(graph_module: fx.GraphModule) -> None:
    """Let operations write into an operand that is read there for the last time.

    Only memory made inside the graph is written to, and only where no view of it is alive.
    """
    graph = graph_module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target not in _IN_PLACE:
            continue
        if node.target is aten.add.Tensor and not node.kwargs and not _free(node, order):
            node.args = node.args[::-1]
        if _free(node, order):
            node.target = _IN_PLACE[node.target]
    graph_module.recompile()


def owned(node: fx.Node) -> bool:
    """Whether the node's memory was made in the graph and is reached through this node only."""
    if node.target in _FRESH or node.target in _WRITERS:
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target is operator.getitem:
        return source.target in _FRESH
    return node.target in _VIEWS and len(source.users) == 1 and owned(source)


def _free(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the node may overwrite its first operand."""
    operand, *others = args_of(node)
    if not isinstance(operand, fx.Node) or _like(operand) != _like(node) or not owned(operand):
        return False
    if operand in others:
        return False
    readers = [user for user in operand.users if user is not node]
    return all(order[user] < order[node] and user.target in _FRESH for user in readers)


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
# Their results are new memory.
_FRESH = {
    aten.bmm.default,
    aten.cat.default,
    aten.clone.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.embedding_dense_backward.default,
    aten.index_select.default,
    aten.mm.default,
    aten.native_layer_norm_backward.default,
    aten.sum.dim_IntList,
    *_IN_PLACE,
}
_VIEWS = {aten.permute.default, aten.reshape.default}
