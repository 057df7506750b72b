"""What a loss depends on that no snapshot can put back: globals, attributes of classes, closures."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .description import Description
from .settings import data_of, differ, globals_read_by, is_torchs, is_users

_MOST = 5000
"""Things looked at; beyond, a change is not seen."""


class Outside:
    """The things as they were when it was made; a look at whether they still are takes microseconds.

    What modules and the loss hold themselves is put back, so that only the functions and classes
    count that are found there, and of these the user's: what installed ones remember is their business.
    """

    def __init__(self, now: Description) -> None:
        self._names: list[tuple[Mapping[str, Any], str, Any]] = []
        self._cells: list[tuple[types.CellType, str, Any]] = []
        self._contents: list[tuple[Any, Any, str]] = []  # each with a copy
        self._arrays: list[tuple[Any, Any, str]] = []
        held = now.inventory
        loss = getattr(now.batch_loss, "loss", None)
        holders = [*held.modules, now.batch_loss, loss]
        self._seen = {id(x): x for x in (*held.parameters.values(), *held.buffers.values())}
        if not now.plain:
            for holder in holders:
                self._visit_held(holder, "the loss")
        self._seen = {}

    def __bool__(self) -> bool:
        return bool(self._names or self._cells or self._contents or self._arrays)

    def changed(self, *, but_grown: bool = False) -> str | None:
        """What is not as it was, by name; None if everything is.

        What has but grown, as counters and caches do, is as it was if ``but_grown``.
        """
        for space, name, value in self._names:
            if space.get(name) is not value and not (but_grown and _grown(value, space.get(name))):
                return name
        for cell, name, value in self._cells:
            if _inside(cell) is not value:
                return name
        for thing, copied, name in self._contents:
            same = thing is copied or not differ(thing, copied)
            if not same and not (but_grown and _grown(copied, thing)):
                return name
        for array, value, name in self._arrays:
            if _mark(array) != value:
                return name
        return None

    def _is_new(self, thing: Any) -> bool:
        new = id(thing) not in self._seen and len(self._seen) < _MOST
        self._seen[id(thing)] = thing
        return new

    def _visit_held(self, thing: Any, name: str) -> None:
        """What is put back itself: only the code in it counts."""
        if isinstance(thing, types.FunctionType | types.MethodType | type | functools.partial):
            self._visit(thing, name)
        elif not isinstance(thing, _LEAVES) and self._is_new(thing):
            self._visit(type(thing), type(thing).__name__)
            for key, item in _items(thing):
                self._visit_held(item, f"{name}.{key}")

    def _visit(self, thing: Any, name: str) -> None:
        """What is not: contents count, too."""
        if isinstance(thing, (*_LEAVES, nn.Module)) or not self._is_new(thing):
            return
        if isinstance(thing, types.FunctionType):
            if is_users(thing.__module__):
                self._visit_function(thing)
        elif isinstance(thing, types.MethodType | functools.partial):
            self._visit(getattr(thing, "__func__", None) or thing.func, name)  # type: ignore[union-attr]
        elif isinstance(thing, type):
            self._visit_class(thing)
        elif isinstance(thing, Tensor | np.ndarray):
            if not isinstance(thing, nn.Parameter):
                self._arrays.append((thing, _mark(thing), name))
        else:
            contents = thing if isinstance(thing, _CONTAINERS) else getattr(thing, "__dict__", None)
            if contents is thing or (contents is not None and not is_torchs(type(thing))):
                self._contents.append((contents, _copied(contents), name))
                for key, item in _items(thing):
                    self._visit(item, f"{name}.{key}")
                self._visit(type(thing), type(thing).__name__)

    def _visit_function(self, function: types.FunctionType) -> None:
        free = function.__code__.co_freevars
        for name, cell in zip(free, function.__closure__ or (), strict=True):
            self._cells.append((cell, name, _inside(cell)))
            self._visit(_inside(cell), name)
        for name, value in globals_read_by(function):
            self._names.append((function.__globals__, name, value))
            self._visit(value, name)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value, function.__name__)

    def _visit_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if is_users(base.__module__):
                space = vars(base)
                self._contents.append((space, dict(space), base.__qualname__))
        for name, value in data_of(kind):
            self._visit(value, f"{kind.__qualname__}.{name}")


_LEAVES = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, types.ModuleType),  # a module leads to all that it has imported
)
_CONTAINERS = (list, tuple, deque, dict, set, frozenset)


def _items(thing: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(thing, dict):
        return list(thing.items())
    if isinstance(thing, list | tuple | deque):
        return list(enumerate(thing))
    return list(getattr(thing, "__dict__", {}).items())


def _grown(before: Any, now: Any) -> bool:
    """Whether all that was there still is, or is a number that was counted up."""
    if now is before:
        return True
    if type(before) is int and type(now) is int:
        return now > before
    if isinstance(before, dict) and isinstance(now, Mapping):
        return all(key in now and _grown(item, now[key]) for key, item in before.items())
    if isinstance(before, list | deque) and isinstance(now, list | deque):
        return len(now) >= len(before) and all(map(_grown, before, now))
    return isinstance(before, set) and isinstance(now, set) and now >= before


def _copied(contents: Any) -> Any:
    return contents if isinstance(contents, tuple | frozenset) else contents.copy()


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _mark(array: Any) -> Any:
    """What changes when an array is written to."""
    if isinstance(array, np.ndarray):
        return array.tobytes() if array.nbytes <= 4096 else None
    return 0 if array.is_inference() else array._version
