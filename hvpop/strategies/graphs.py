"""Why a function cannot be differentiated twice: what torch's errors and graphs say, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction, once_differentiable

from .. import _torch
from ..graph import End, nodes_of


class NoSecondDerivativeError(RuntimeError):
    """A strategy met an op that it cannot differentiate twice."""


class OnceDifferentiableError(NoSecondDerivativeError):
    """The function contains an ``autograd.Function`` whose author ruled out a second derivative."""


class NoDerivativeError(RuntimeError):
    """A model meets an op that has not even a first derivative here; the message says the way out."""


_HOPELESS = (
    (
        r"FlexAttention does not support backward on CPU",
        "FlexAttention has no derivatives on the CPU: "
        'build the model with attn_implementation="sdpa" or "eager"',
    ),
    (
        r"Expected mat_a to be Float32",
        "grouped matrix products of experts exist in float32 only: convert the model with .float(), "
        'or call model.set_experts_implementation("eager")',
    ),
)

_MISSING = (
    (r"derivative for aten::(\S+) is not implemented", "the op {} has no double backward"),
    (r"the derivative for '(\S+)' is not implemented", "the op {} has no derivative"),
    (r"forward AD with (\S+?),? (?:that|because|but)", "the op {} has no forward-mode derivative"),
    (r"Nested forward mode AD", "the model uses forward mode itself, which cannot be nested"),
    (r"ZeroTensors are immutable", "an op writes into a forward-mode zero"),
    (r"must implement the jvp", "a custom autograd.Function has no jvp"),
    (r"through (\S+) but no autograd formula", "the op {} has no derivative"),
    (r"does not currently support double backward", "compiled code has no double backward"),
    (
        r"SymIntArrayRef expected|NestedTensorImpl doesn't|aten\._(nested|has_same_storage_numel)",
        "an op of nested tensors has no such derivative",
    ),
    (r"once_differentiable", "a custom autograd.Function is once_differentiable"),
)


class explained(AbstractContextManager[None]):  # noqa: N801 (used like a function)
    """Turn torch's complaints about missing derivatives into a `NoSecondDerivativeError`."""

    def __init__(self, strategy: object) -> None:
        self._strategy = strategy

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, _EXPLAINED):
            return  # NotImplementedError is a RuntimeError
        if "KeyboardInterrupt" in str(error):  # TorchScript makes an error of it
            raise KeyboardInterrupt from error
        for pattern, words in _HOPELESS:
            if re.search(pattern, str(error)):
                raise NoDerivativeError(words) from error
        reason = why_missing(error) or _why_broken(error)
        if reason is not None:
            raise NoSecondDerivativeError(f"{self._strategy!r}: {reason}; {_HINT}") from error


class explained_once(AbstractContextManager[None]):  # noqa: N801
    """Say what to do where torch cannot differentiate even once."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, _EXPLAINED):
            return
        reason = _why_broken(error)
        if reason is not None:
            raise NoDerivativeError(
                f"{reason}, so that backward() of the loss fails as well; replace the op, or pad what is nested"
            ) from error


_EXPLAINED = (NoSecondDerivativeError, NoDerivativeError)


def why_missing(error: Exception) -> str | None:
    """What derivative is missing according to an error of torch's; None if it is about other things."""
    for pattern, words in _MISSING:
        found = re.search(pattern, str(error))
        if found:
            return words.format(*found.groups())
    return None


def _why_broken(error: BaseException) -> str | None:
    """What torch says where a derivative of its own fails; None if the error is of another place."""
    codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    if _torch.engine.__code__ not in codes or "memory" in str(error).lower():
        return None
    behind = codes[codes.index(_torch.engine.__code__) :]
    if not all(code.co_filename.startswith(_TORCH) for code in behind):
        return None  # a hook or a Function of the user's
    return f"torch's derivative of an op fails ({str(error).partition(chr(10))[0]})"


_TORCH = str(Path(torch.__file__).parent)


def check_graph(strategy: object, ends: Iterable[End]) -> None:
    """Refuse a loss and gradient whose graph would drop a part of the second derivative.

    ``autograd.grad`` raises nothing at a ``once_differentiable`` Function: the node that would
    raise leads nowhere, so the pass goes around it, and there is no such node if what arrives at
    the Function is a constant. It has to be looked for.
    """
    for node in nodes_of(ends):
        if type(node).__name__ == "Error" or _is_once_differentiable(node):
            raise OnceDifferentiableError(
                f"{strategy!r}: a custom autograd.Function is once_differentiable, so its second "
                f"derivative is not defined; strategy=FiniteDifference() ignores that"
            )


def _is_once_differentiable(node: Any) -> bool:
    if not isinstance(node, BackwardCFunction):
        return False
    return getattr(_torch.function_of(node).backward, "__code__", None) is _ONCE


_ONCE = once_differentiable(lambda ctx: None).__code__  # of the wrapper that the decorator makes


_HINT = (
    "strategy=FiniteDifference() needs first derivatives only; strategy=None falls back by itself"
)
