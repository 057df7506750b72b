"""Parameters that a loss reaches past the model: by a list made before, or an optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def reaches_past(loss: Tensor, live: Mapping[str, Tensor]) -> bool:
    """Whether the graph of a loss ends in live parameters, instead of those put in their places."""
    own = {id(parameter) for parameter in live.values()}
    return any(id(leaf) in own for leaf in leaves_of(loss))


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors in which the graph of a loss ends."""
    found: list[Tensor] = []
    stack: list[Any] = [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        new = {parent for parent, _ in node.next_functions} - seen
        seen |= new
        stack += new
    return found


class Substitution(TorchFunctionMode):
    """Every op sees the tensors in use in place of the live parameters they stand for."""

    def __init__(self, live: Mapping[str, Tensor], used: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._used = {id(live[name]): tensor for name, tensor in used.items() if name in live}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = pytree.tree_map(lambda x: self._used.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)
