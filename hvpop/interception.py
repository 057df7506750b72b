"""One look at each call of torch: tables say which op is done in another way, or is watched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _torch
from .exchange import Exchange

Table = Mapping[Callable[..., Any], Callable[..., Any]]
"""An op of torch -> what is called with its arguments first. None as a result lets the op run."""

StandIns = Mapping[int, Tensor]
"""By the id of a tensor, the one that every op sees in its place."""


class Interception(Exchange):
    """While it is active, ops are looked up in its tables, and tensors replaced by their stand-ins.

    One inside another adds to what the first one does, so that however many are active, a call
    costs one look: 1 to 2 microseconds for an op, 4 to 9 for the Python functions of
    `torch.nn.functional`.
    """

    def __init__(self, *tables: Table, stand_ins: StandIns | None = None) -> None:
        super().__init__()
        self._tables = tables
        self._stand_ins = stand_ins

    def _change(self) -> None:
        mode = _HERE.mode
        if mode is None:
            mode = _Mode()
            self._noted(_deactivate, _torch.function_modes())
            _HERE.mode = mode
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._noted(mode.become, mode.tables, mode.stand_ins)
        stand_ins = {**mode.stand_ins, **self._stand_ins} if self._stand_ins else mode.stand_ins
        mode.become((*self._tables, *mode.tables), stand_ins)


class Reentered(Exchange):
    """The active interception again, in what an intercepted call calls back: torch has it off there."""

    def _change(self) -> None:
        mode, stack = _HERE.mode, _torch.function_modes()
        if mode is not None and not any(_torch.function_mode_at(i) is mode for i in range(stack)):
            self._noted(_shorten, stack)
            mode.__enter__()  # type: ignore[no-untyped-call]


class _Mode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.tables: tuple[Table, ...] = ()
        self.stand_ins: StandIns = {}

    def become(self, tables: tuple[Table, ...], stand_ins: StandIns) -> None:
        self.tables, self.stand_ins = tables, stand_ins

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # torch runs this method with the mode off: a handler may call the op it is asked for.
        if self.stand_ins:
            args, kwargs = replaced((args, kwargs), self.stand_ins)
        for table in self.tables:
            handler = table.get(func)
            if handler is not None:
                result = handler(*args, **(kwargs or {}))
                if result is not None:
                    return result
        return func(*args, **kwargs) if kwargs else func(*args)


class _Here(threading.local):
    mode: _Mode | None = None


_HERE = _Here()


def _deactivate(stack: int) -> None:
    _HERE.mode = None
    _shorten(stack)


def _shorten(stack: int) -> None:
    while _torch.function_modes() > stack:
        _torch.pop_function_mode()


def replaced(thing: Any, stand_ins: StandIns) -> Any:
    """The same arguments with tensors replaced by their stand-ins, in containers too."""
    if isinstance(thing, Tensor):
        return stand_ins.get(id(thing), thing)
    if type(thing) is tuple or type(thing) is list:
        return type(thing)([replaced(item, stand_ins) for item in thing])
    if type(thing) is dict:
        return {key: replaced(item, stand_ins) for key, item in thing.items()}
    return thing


def stood_in(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of what no mode sees, as the active interception would pass them."""
    mode = _HERE.mode
    return replaced(args, mode.stand_ins) if mode is not None and mode.stand_ins else args
