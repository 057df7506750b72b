"""What a loss depends on beside tensors: modes, sizes, rates, switches, functions, hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LONG = 1000
"""Containers of more items than this are what they are as long as they are the same, too."""

_SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))

_ELSEWHERE = {"_parameters", "_buffers", "_modules"}  # tensors, and modules of their own


class _Same:
    """An object that equals itself only. Held, so that no other one can take its address."""

    def __init__(self, thing: object) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._thing is other._thing


def settings_of(thing: Any, depth: int) -> Any:
    """A description that compares equal as long as nothing has been set, replaced or hooked.

    It is of the values of scalars, and of containers and objects that hold them, ``depth`` of these
    within one another. Functions, modules, tensors and what is deeper are what they are as long as
    they are the same. What a closure holds is not seen.
    """
    if isinstance(thing, float):
        return float, repr(thing)  # NaN does not equal itself
    if isinstance(thing, _SCALARS):
        return type(thing), thing
    if isinstance(thing, nn.Module):
        return _Same(thing), _attributes(thing, depth)
    if depth == 0 or isinstance(thing, Tensor | type):
        return _Same(thing)
    if isinstance(thing, list | tuple | Mapping) and len(thing) <= _LONG:
        items = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
        return type(thing), [(key, settings_of(item, depth - 1)) for key, item in items]
    return _Same(thing), _attributes(thing, depth - 1) if hasattr(thing, "__dict__") else None


def _attributes(thing: Any, depth: int) -> list[Any]:
    return [
        (name, _Same(value) if isinstance(value, nn.Module) else settings_of(value, depth))
        for name, value in vars(thing).items()
        if name not in _ELSEWHERE
    ]
