"""Fewer calls and buffers, for graphs that run operation by operation."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from .sums import args_of, aten


def fuse_additions(graph_module: fx.GraphModule) -> None:
    """``beta c + alpha A B`` as the one BLAS call that it is."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        total, product = args_of(node)
        if not (isinstance(total, fx.Node) and isinstance(product, fx.Node)):
            continue  # a number
        scales = dict(node.kwargs)
        if _is_addend(total, node) and total > product:  # nodes compare by place
            # The earlier one's operands need not be kept until then.
            total, product = product, total
            scales = {"beta": scales["alpha"]} if scales else {}
        if not _is_addend(product, node):
            continue
        fused: Any = _FUSED[product.target]
        if total.target is aten.mul.Tensor and len(total.users) == 1:
            whole, factor = args_of(total)
            if isinstance(factor, float):
                total, scales["beta"] = whole, factor * scales.get("beta", 1)
        with graph.inserting_before(node):
            call = graph.call_function(fused, (total, *product.args), scales)
        call.meta = node.meta.copy()
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _is_addend(product: fx.Node, total: fx.Node) -> bool:
    """Whether a matrix product is only read by a sum of its shape."""
    return product.target in _FUSED and len(product.users) == 1 and _like(product) == _like(total)


def wait_for_readers(graph_module: fx.GraphModule) -> None:
    """Move what is computed from residuals and v alone to its first reader.

    Traced, half of a backward pass's products come before the forward pass that they do not depend
    on. Their results would be kept until then, and be out of the cache when they are added to.
    """
    graph = graph_module.graph
    at_hand = set(graph.find_nodes(op="placeholder"))
    waiting = []
    for node in graph.nodes:
        if node.op == "call_function" and at_hand.issuperset(node.all_input_nodes):
            waiting.append(node)
            if not _fresh(node):  # a view
                at_hand.add(node)
    for node in reversed(waiting):
        min(node.users).prepend(node)  # nodes compare by place
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
    for node in graph.nodes:
        if node.target not in _IN_PLACE:
            continue
        if node.target is aten.add.Tensor and not node.kwargs and not _expendable(node):
            node.args = node.args[::-1]
        if _expendable(node):
            node.target = _IN_PLACE[node.target]
    graph_module.recompile()


def undo_writes(graph_module: fx.GraphModule) -> bool:
    """The inverse: plain operations for those that write into such an operand. Whether all could go."""
    graph = graph_module.graph
    writes = [node for node in graph.nodes if writing(node)]
    for node in writes:
        plain = _plain_form(node.target)
        if plain is None or not (_reshaping(node) or _expendable(node)):
            return False
        if not _unpromoted(node, plain):
            return False
        node.target = plain
    graph_module.recompile()
    return True


def writing(node: fx.Node) -> bool:
    """Whether the node changes one of its operands."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def owned(node: fx.Node) -> bool:
    """Whether the node's memory was made in the graph and is reached through this node only."""
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, fx.Node):
        return _fresh(source)
    if node.target in _IN_PLACE.values() or _fresh(node):
        return True
    return (
        node.target in _VIEWS
        and isinstance(source, fx.Node)
        and len(source.users) == 1
        and owned(source)
    )


def _fresh(node: fx.Node) -> bool:
    """Whether the node's results are new memory, whatever its operands are."""
    if not isinstance(node.target, OpOverload) or node.target is aten._unsafe_view.default:
        return False
    return all(result.alias_info is None for result in node.target._schema.returns)


def _expendable(node: fx.Node) -> bool:
    """Whether the node may write into its first operand, or had no need to."""
    operand, *others = args_of(node)
    if not isinstance(operand, fx.Node) or _like(operand) != _like(node):
        return False
    reader = node
    while True:  # through the views that the operand is
        readers = [user for user in operand.users if user is not reader]
        if operand in others or any(user > node or not _fresh(user) for user in readers):
            return False
        if owned(operand):
            return True
        if operand.target not in _VIEWS:
            return False
        reader, operand = operand, args_of(operand)[0]


def _reshaping(node: fx.Node) -> bool:
    """Whether the node changes its operand's shape only (``unsqueeze_``), and for its own readers."""
    if torch.Tag.inplace_view not in node.target.tags:  # type: ignore[union-attr]
        return False
    return all(user <= node for user in args_of(node)[0].users)


def _plain_form(target: OpOverload) -> OpOverload | None:
    """``aten::mul`` for ``aten::mul_``, if there is one that takes the same arguments."""
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    forms: list[OpOverload] = [getattr(packet, overload) for overload in packet.overloads()]
    same = [
        form for form in forms if not form._schema.is_mutable and _taken(form) == _taken(target)
    ]
    return same[0] if same else None


def _taken(target: OpOverload) -> list[tuple[str, Any]]:
    """The types and defaults of an operation's arguments; their names differ (``pow_``, ``pow``)."""
    return [(str(a.type), a.default_value) for a in target._schema.arguments]


def _unpromoted(node: fx.Node, plain: OpOverload) -> bool:
    """Whether the plain operation gives the dtype of the operand that this one writes into."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
    with node.meta["val"].fake_mode:
        return bool(plain(*args, **kwargs).dtype == node.meta["val"].dtype)


def _like(node: fx.Node) -> tuple[Any, ...]:
    val = node.meta["val"]
    return tuple(val.shape), val.dtype, val.device


_VIEWS = (aten.permute.default, aten.reshape.default)
_FUSED: dict[Any, Any] = {
    aten.mm.default: aten.addmm.default,
    aten.bmm.default: aten.baddbmm.default,
}
ELEMENTWISE = (aten.add.Tensor, aten.addcmul.default, aten.mul.Tensor)
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.addcmul.default: aten.addcmul_.default,
    aten.addmm.default: aten.addmm_.default,
    aten.baddbmm.default: aten.baddbmm_.default,
    aten.mul.Tensor: aten.mul_.Tensor,
}
