"""Whether torch still calls what hvpop replaces of it: tiny cases, tried once per process.

A name that torch no longer calls would let an evaluation go on at other parameters, or without
some. Where other means would see that, there is no case here: a checkpoint that runs again without
being reentrant does so in a hook, which is noticed; what holds on to parameters that are exchanged
ends in them, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .. import _torch
from ..exchange import Entered
from ..graph import nodes_of
from ..interception import Interception
from . import policies


def refuse_what_is_not_seen(value: Tensor) -> None:
    """Raise if a loss makes use of something that a patch of `hvpop.risk.policies` should have met.

    Raises
    ------
    RuntimeError
        With the name that this torch does not call.
    """
    for name, use in broken():
        if use(value):
            raise RuntimeError(
                f"hvpop evaluates such models by replacing {name}, which torch {torch.__version__} "
                f"does not call any more: this model has what needs it (a custom autograd.Function, a "
                f"hook or a checkpoint), and its products would be wrong. Install a torch from "
                f"{_torch.OLDEST} to {_torch.NEWEST}, or a newer hvpop"
            )


_Use = Callable[[Tensor], bool]


@cache
def broken() -> tuple[tuple[str, _Use], ...]:
    """The names that torch does not call, and what tells that a loss needed it."""
    return tuple((name, use) for name, use, works in _cases() if not works())


def _cases() -> Iterator[tuple[str, _Use, Callable[[], bool]]]:
    yield "torch.autograd.function.BackwardCFunction.apply", _has_functions, _backward_is_seen
    yield "torch.autograd.graph.saved_tensors_hooks.__enter__", _perhaps, _hooks_are_seen
    yield "torch.utils.checkpoint.CheckpointFunction.apply", _perhaps, _reentrant_runs_once


def _has_functions(value: Tensor) -> bool:
    return any(isinstance(node, BackwardCFunction) for node in nodes_of([value]))


def _perhaps(value: Tensor) -> bool:
    return True  # nothing in a graph tells how its tensors are saved, or what has been cut off


def _backward_is_seen() -> bool:
    seen: list[Any] = []
    x = torch.zeros(1, requires_grad=True)
    with (
        Entered(torch.enable_grad()),
        policies.FunctionsWatched(),
        Interception({torch.sinh: seen.append}),  # which returns None
    ):
        y = _Asking.apply(x)  # type: ignore[no-untyped-call]
        torch.autograd.grad(y, x, torch.ones_like(x))
    return bool(seen)


class _Asking(torch.autograd.Function):
    """Its backward calls an op that no forward pass does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.sinh(g)


def _hooks_are_seen() -> bool:
    before = set(policies.hooks)
    policies.hooks.clear()
    with policies.FunctionsWatched(), saved_tensors_hooks(lambda t: t, lambda t: t):
        seen = len(policies.hooks) > 0
    policies.hooks.clear()
    policies.hooks.update(before)
    return seen


def _reentrant_runs_once() -> bool:
    runs: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        runs.append(x)
        return x.square()

    x = torch.zeros(1, requires_grad=True)
    call: Any = unwrap(checkpoint)  # without what imports a compiler, for a second
    with Entered(torch.enable_grad()), policies.TwiceDifferentiable():
        call(run, x, use_reentrant=True).backward()
    return len(runs) == 1
