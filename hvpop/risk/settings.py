"""What a loss depends on beside tensors: modes, sizes, rates, switches, functions, hooks."""

from __future__ import annotations

import argparse
import copy
import dis
import functools
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._torch import content
from .randomness import is_generator

_LONG = 1000
"""Containers of more items than this are what they are as long as they are the same, too."""

_MOST = 20_000
"""Things looked at; beyond, the same."""

_DEEP = 12
"""Levels of things within one another; beyond, the same."""

_SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))

_ELSEWHERE = {"_parameters", "_buffers"}  # tensors have fingerprints of their own

_OPAQUE = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    nn.Parameter,
)
"""What is what it is as long as it is the same: parameters change, and are none, nor are
random states."""


def _is_opaque(thing: Any) -> bool:
    return isinstance(thing, _OPAQUE) or is_generator(thing)


class _Same:
    """An object that equals itself only. Held, so that no other one can take its address."""

    def __init__(self, thing: object) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._thing is other._thing


def settings_of(*things: Any) -> Any:
    """A description that compares equal as long as nothing has been set, replaced or hooked.

    It is of the values of scalars, arrays and small tensors, of containers and objects that hold
    them, however deep, of the attributes of the user's classes, and of what a function closes over,
    has as defaults or reads of its module's data, itself or by the user's functions that it calls.
    Parameters and buffers are left out.
    """
    walk = _Walk()
    return [walk.described(thing) for thing in things]


class _Walk:
    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, object]] = {}
        self._depth = 0

    def described(self, thing: Any) -> Any:
        if isinstance(thing, float):
            return float, repr(thing)  # NaN does not equal itself
        if isinstance(thing, _SCALARS):
            return type(thing), thing
        if id(thing) in self._seen:
            return "seen", self._seen[id(thing)][0]
        self._seen[id(thing)] = len(self._seen), thing
        if len(self._seen) > _MOST or self._depth == _DEEP:
            return _Same(thing)
        self._depth += 1
        found = self._within(thing)
        self._depth -= 1
        return found

    def _within(self, thing: Any) -> Any:
        if isinstance(thing, type) and not is_torchs(thing):
            return _Same(thing), self._named(data_of(thing))
        if isinstance(thing, Tensor) and not isinstance(thing, nn.Parameter):
            return _Same(thing), *_tensor(thing)
        if isinstance(thing, np.ndarray | np.generic):
            return type(thing), str(thing.dtype), np.shape(thing), _bytes(thing)
        if _is_opaque(thing):
            return _Same(thing)
        if isinstance(thing, types.FunctionType):
            return _Same(thing), self._named(_read_by(thing))
        if isinstance(thing, types.MethodType):
            return self.described(thing.__func__), self.described(thing.__self__)
        if isinstance(thing, functools.partial):
            return type(thing), self.described((thing.func, thing.args, thing.keywords))
        if isinstance(thing, list | tuple | deque | Mapping | Set) and len(thing) <= _LONG:
            return type(thing), self._items(thing)
        if type(thing).__module__.startswith("hvpop.") and not hasattr(thing, "loss"):
            return _Same(thing)  # operators and risks are no settings of a loss that holds them
        return _Same(thing), self.described(type(thing)), self._named(_attributes(thing))

    def _items(self, thing: Any) -> list[Any]:
        if isinstance(thing, Mapping):
            return [(self.described(key), self.described(item)) for key, item in thing.items()]
        if isinstance(thing, Set):
            return sorted(repr(item) for item in thing)
        return [self.described(item) for item in thing]

    def _named(self, values: Iterable[tuple[str, Any]]) -> list[Any]:
        return [(name, self.described(value)) for name, value in values]


def is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins", "collections", "hvpop")


def data_of(kind: type) -> Iterator[tuple[str, Any]]:
    """The attributes of a class of the user's, and of its bases, that are data, or read some."""
    for base in kind.__mro__:
        if is_torchs(base):
            continue
        users = is_users(base.__module__)
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else value
            function = getattr(function, "__func__", function)
            if users and isinstance(function, types.FunctionType):
                yield name, function
            elif (
                not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
            ):
                yield name, value


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, in its dictionary or in slots."""
    for name, value in getattr(thing, "__dict__", {}).items():
        if name not in _ELSEWHERE or not isinstance(thing, nn.Module):
            yield name, value
    for name in _slots(type(thing)):
        with suppress(AttributeError):
            yield name, getattr(thing, name)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        yield from (names,) if isinstance(names, str) else names


def _read_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function depends on beside its arguments: closure, defaults, data of its module."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not filled yet
            yield name, cell.cell_contents
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    yield from getattr(function, "__dict__", {}).items()
    yield from globals_read_by(function)


def globals_read_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The data of its module that a function may read, and the user's functions and classes there."""
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        kind = value if isinstance(value, types.FunctionType | type) else type(value)
        users = is_users(kind.__module__) and not isinstance(value, nn.Module)
        if users or isinstance(value, _PLAIN):
            yield name, value


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """What a function may read of its module, the functions inside it included."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    own = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return tuple(dict.fromkeys([*own, *(name for c in inner for name in _names(c))]))


@functools.lru_cache(maxsize=1024)
def is_users(module: str | None) -> bool:
    """Whether a module is no installed one: what these hold is as their authors wrote it."""
    top = (module or "").partition(".")[0]
    if top in {*sys.stdlib_module_names, "hvpop", "torch"} - {"__main__"}:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return not file.startswith(_INSTALLED)


_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    held = tensor.layout is torch.strided and not tensor.is_nested
    if type(tensor) is Tensor and held and tensor.is_cpu and tensor.nbytes <= 2**20:
        dense = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
        return version, tensor.dtype, tensor.shape, content(dense).tobytes()
    if tensor.numel() <= _LONG and held and not tensor.is_meta:
        with torch.no_grad():
            return version, repr(tensor.detach().tolist())
    return (version,)


def _bytes(array: Any) -> Any:
    return array.tobytes() if array.nbytes <= 2**20 else _Same(array)


_PLAIN = (
    *_SCALARS,
    *(list, tuple, deque, Mapping, Set),
    np.ndarray,
    types.SimpleNamespace,
    argparse.Namespace,
)
"""What is looked at where a function reads it of its module."""


class Snapshot:
    """The settings of some objects as they are now, to be put in their places again later."""

    def __init__(self, holders: Iterable[Any], fixed: Iterable[Any]) -> None:
        """``fixed`` are shared with the user, not copied: modules, parameters and buffers."""
        self._shared = {id(thing): thing for thing in fixed}
        memo = dict(self._shared)
        kept = {id(holder): holder for holder in holders if hasattr(holder, "__dict__")}
        self._kept = [(vars(h), _own_items(vars(h), memo)) for h in kept.values()]
        scripted = [h for h in kept.values() if isinstance(h, torch.jit.ScriptModule)]
        self._modes = [(module, module.training) for module in scripted]  # not in its dictionary

    def changed(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The dictionaries that are not as they were, each with a fresh copy of what it held."""
        memo = dict(self._shared)
        return [(now, _own_items(kept, memo)) for now, kept in self._kept if differ(now, kept)]

    def changed_modes(self) -> list[tuple[nn.Module, bool]]:
        """Scripted modules that have left train or eval mode, and the one to be in."""
        return [(m, mode) for m, mode in self._modes if m.training != mode]


def differ(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether anything was set; identical objects compare equal without being looked at."""
    try:
        return now != before
    except Exception:  # a replaced tensor or array has no truth value; other objects may refuse too
        return True


def _own_items(items: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    return {n: v if n in _ELSEWHERE else _own(v, memo) for n, v in items.items()}


def _own(thing: Any, memo: dict[int, Any]) -> Any:
    """A copy of what is plain data, however nested; anything else itself."""
    if isinstance(thing, (*_SCALARS, types.FunctionType, nn.Module)) or _is_opaque(thing):
        return thing
    if id(thing) in memo:
        return memo[id(thing)]
    memo[id(thing)] = thing  # in case it holds itself
    memo[id(thing)] = copied = _copied(thing, memo)
    return copied


def _copied(thing: Any, memo: dict[int, Any]) -> Any:
    if isinstance(thing, Tensor):
        own = type(thing) is Tensor and not thing.requires_grad and thing.numel() <= 2**16
        return thing.clone() if own and not thing.is_inference() else thing
    if isinstance(thing, np.ndarray):
        return thing.copy() if thing.nbytes <= 2**20 else thing
    if type(thing) in (list, tuple, set, frozenset) and len(thing) <= _LONG:
        return type(thing)([_own(item, memo) for item in thing])
    if type(thing) is deque and len(thing) <= _LONG:
        return deque([_own(item, memo) for item in thing], thing.maxlen)
    if type(thing) is functools.partial:
        return functools.partial(
            thing.func,
            *(_own(item, memo) for item in thing.args),
            **{name: _own(item, memo) for name, item in thing.keywords.items()},
        )
    if isinstance(thing, dict) and len(thing) <= _LONG:
        copied = copy.copy(thing)
        for key, item in thing.items():
            copied[key] = _own(item, memo)
        return copied
    if type(thing).__module__.partition(".")[0] in _LIBRARIES or callable(thing):
        return thing
    try:
        copied = copy.copy(thing)
        for name, value in _attributes(thing):
            object.__setattr__(copied, name, _own(value, memo))
    except Exception:  # it may not want to be copied, and is what it is then
        return thing
    return copied


_LIBRARIES = ("hvpop", "torch", "threading", "logging", "io", "weakref", "_thread", "pathlib", "re")
