"""Autograd graphs: their nodes, where they end, and what ``backward()`` makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import _torch
from .exchange import Ungraded

End = Tensor | GradientEdge
"""Where a graph begins. An edge does not hold the tensor that it is of: of a gradient, as many
numbers as there are parameters."""


def edge(tensor: Tensor) -> GradientEdge:
    """Where the graph of a tensor begins; under grad mode, since it may take one step more.

    The edge of a node in Python does not keep that alive before torch 2.7; the next node does.
    """
    return get_gradient_edge(
        tensor.view_as(tensor) if isinstance(tensor.grad_fn, BackwardCFunction) else tensor
    )


def nodes_of(ends: Iterable[End]) -> Iterator[Any]:
    """Every node of the autograd graph behind some tensors, once."""
    first = (end.grad_fn if isinstance(end, Tensor) else end.node for end in ends)
    stack: list[Any] = [node for node in first if node is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors in which the graph of a loss ends."""
    found = (getattr(node, "variable", None) for node in nodes_of([loss]))
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def is_alone(loss: Tensor) -> bool:
    """Whether a loss is a leaf that nothing goes on from, such as ``zeros((), requires_grad=True)``."""
    return loss.is_leaf and not (loss._backward_hooks or loss._post_accumulate_grad_hooks)


def saved_by(ends: Iterable[End]) -> Iterator[Tensor]:
    """The tensors that a graph keeps.

    Raises
    ------
    LookupError
        At a node that does not show what it keeps: of a C++ extension, of a write into a view.
    """
    for node in nodes_of(ends):
        yield from _torch.saved_by(node)


Function = TypeVar("Function", bound=type)


def signed(function: Function) -> Function:
    """A custom Function whose signature is at hand: torch asks at each call, and finding it takes as long as an op."""
    forward: Any = vars(function)["forward"].__func__
    forward.__signature__ = inspect.signature(forward)
    return function


def wanted(ctx: Any) -> tuple[bool, ...]:
    """By which inputs of a custom Function, tensors first, the pass at work asks for derivatives.

    ``ctx.needs_input_grad`` has in it what any other pass through the same graph may ask for.
    """
    # of the tensors; not while functorch differentiates
    behind = getattr(ctx, "next_functions", None)
    if behind is None:
        return tuple(ctx.needs_input_grad)
    return tuple(node is not None and _is_asked(node) for node, _ in behind)


def _is_asked(node: Any) -> bool:
    try:
        return bool(_torch.will_run(node))
    except RuntimeError:  # what torch says of a leaf whose derivative is asked for
        return True


_ORDINARY = (Tensor, torch.nn.Parameter, GradientEdge)


def pulled(
    outputs: Sequence[End],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    batched: bool = False,
    keep: bool = True,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` with the graph kept, if not told otherwise, and None for inputs not reached.

    Cotangents of the outputs' shapes go to the engine without having their shapes looked at in
    Python: 15 of 220 microseconds for the four parameters of a small network.
    """
    if batched or any(type(t) not in _ORDINARY for t in (*outputs, *inputs)):
        ends: Any = outputs  # torch's stubs want them to be all of one kind
        return torch.autograd.grad(
            ends,
            inputs,
            cotangents,
            retain_graph=keep,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    found: tuple[Tensor | None, ...] = _torch.engine(
        tuple(outputs),
        tuple(cotangents),
        keep,
        create_graph,
        tuple(inputs),
        True,
        accumulate_grad=False,
    )
    return found


def backward(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``loss.backward()`` gives those of some tensors that it reaches; no tensor keeps any.

    What hooks and Functions add past the graph counts.
    """
    with Ungraded([*leaves.values(), *leaves_of(loss)]):  # what a loss closes over gets some, too
        if loss.requires_grad:
            loss.backward()
        return {name: p.grad for name, p in leaves.items() if p.grad is not None}
