"""A model's parameters and buffers: which count, under which names, and how others take their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..exchange import ONE_THREAD, Exchange
from .settings import Snapshot, differ

Selection = Any
"""``params=``: None, a name, a glob, a module, a parameter, a predicate ``(name, parameter) -> bool``,
a mapping with names as keys, or an iterable of these."""


Slots = Any
"""What has tensors by name: those of a module, or a `_ScriptSlots`."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DataParallel, DistributedDataParallel, Fabric's and SWA wrappers."""
    while True:
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = cast(nn.Module, module._orig_mod)
        elif isinstance(module, _WRAPPERS) and isinstance(module.module, nn.Module):
            module = module.module
        elif type(module).__name__ == "_FabricModule":  # Lightning's
            module = cast(nn.Module, module._original_module)
        else:
            return module


_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)


class Inventory:
    """Every tensor of some modules, each once, with all the slots that hold it.

    Made anew whenever the live model is read, since users replace parameters and modules.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._roots = roots
        self.slots: list[tuple[Slots, str, str]] = []
        self.recurrent: list[nn.RNNBase] = []
        self.modules: list[nn.Module] = []
        seen: dict[int, str] = {}
        with ONE_THREAD:  # else another one's parameters may be in the places of the user's
            for root, module in roots.items():
                for path, child in module.named_modules(prefix=root):
                    self._add(path, child, seen)

    def _add(self, path: str, module: nn.Module, seen: dict[int, str]) -> None:
        self.modules.append(module)
        if isinstance(module, nn.RNNBase):
            self.recurrent.append(module)
        scripted = isinstance(module, torch.jit.ScriptModule)
        for kind, tensors in (
            (self.parameters, module._parameters),
            (self.buffers, module._buffers),
        ):
            slots: Slots = _ScriptSlots(module) if scripted else tensors
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                full = f"{path}.{key}" if path else key
                name = seen.setdefault(id(tensor), full)
                kind.setdefault(name, tensor)
                self.slots.append((slots, key, name))

    def trainable(self, selection: Selection = None) -> dict[str, Tensor]:
        """The parameters that require a gradient and are selected, in the model's order."""
        trainable = {n: p for n, p in self.parameters.items() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "the model has no trainable parameter: none has requires_grad=True; "
                "call model.requires_grad_(True) or choose other parameters"
            )
        if selection is None:
            return trainable
        items = _items(selection)
        wanted = [self._test(item) for item in items]
        chosen = {n: p for n, p in trainable.items() if any(test(n, p) for test in wanted)}
        for item, test in zip(items, wanted, strict=True):
            if not any(test(n, p) for n, p in trainable.items()):
                inside = isinstance(item, str) and any(n.startswith(f"{item}.") for n in trainable)
                meant = f"did you mean {item + '.*'!r}? " if inside else ""
                shown = repr(item) if isinstance(item, str) else f"<{type(item).__name__}>"
                raise ValueError(
                    f"params={shown} matches no trainable parameter; {meant}"
                    f"there are {', '.join(trainable)}"
                )
        if not chosen:
            raise ValueError(f"params= is empty; choose from {', '.join(trainable)}")
        return chosen

    def _test(self, item: Any) -> Callable[[str, Tensor], bool]:
        if isinstance(item, str):
            aliases = self._aliases()
            return lambda name, p: any(
                fnmatchcase(alias, item) for alias in (name, *aliases.get(id(p), ()))
            )
        if isinstance(item, nn.Module):
            held = {id(p) for p in unwrapped(item).parameters()}
            return lambda name, p: id(p) in held
        if isinstance(item, Tensor):
            return lambda name, p: p is item
        if callable(item):
            return lambda name, p: bool(item(name, p))
        raise TypeError(
            "params= takes names, globs, modules, parameters or a predicate (name, parameter) -> bool, "
            f"got {type(item).__name__}"
        )

    def _aliases(self) -> dict[int, list[str]]:
        """Every name of each parameter by its id, through modules held twice too."""
        names: dict[int, list[str]] = {}
        for root, top in self._roots.items():
            for path, module in top.named_modules(prefix=root, remove_duplicate=False):
                for key, parameter in module._parameters.items():
                    names.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
        return names

    def holding(
        self, tensors: Mapping[str, Tensor], snapshot: Snapshot | None = None
    ) -> AbstractContextManager[None]:
        """``tensors`` in the places of the parameters and buffers of their names, for a while.

        And settings as they were when the ``snapshot`` was taken, if there is one.
        """
        return _Holding(self, tensors, snapshot)


class _Holding(Exchange):
    def __init__(
        self, inventory: Inventory, tensors: Mapping[str, Tensor], snapshot: Snapshot | None
    ) -> None:
        super().__init__()
        self._inventory, self._tensors, self._snapshot = inventory, tensors, snapshot

    def _change(self) -> None:
        tensors = self._tensors
        # What a forward pass leaves in a module (computed weights, activations) is undone too.
        attributes = [(m.__dict__, m.__dict__.copy()) for m in self._inventory.modules]
        buffers = [(m._buffers, len(m._buffers)) for m in self._inventory.modules]
        replaced = [
            (slots, key, slots[key], tensors[name])
            for slots, key, name in self._inventory.slots
            if name in tensors and slots[key] is not tensors[name]
        ]
        settings = [] if self._snapshot is None else self._snapshot.changed()
        modes = [] if self._snapshot is None else self._snapshot.changed_modes()
        attributes += [(held, held.copy()) for held, _ in settings]
        self._noted(_restore, replaced, buffers, attributes)
        for module, before in modes:
            self._set(module, "training", before)
        for held, kept in settings:
            held.clear()
            held.update(kept)
        for slots, key, _, tensor in replaced:
            slots[key] = tensor
        for module in self._inventory.recurrent:  # they keep a list of weights beside the slots
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, name, None) for name in names]


def _restore(
    replaced: list[tuple[Slots, str, Any, Any]],
    buffers: list[tuple[dict[str, Any], int]],
    attributes: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    for slots, key, tensor, _ in reversed(replaced):
        slots[key] = tensor
    for held, count in buffers:
        if len(held) > count:
            for name in list(held)[count:]:  # made in the forward pass
                del held[name]
    for now, before in reversed(attributes):
        if differ(now, before):
            now.clear()
            now.update(before)


class _ScriptSlots:
    """The slots of a ScriptModule, whose tensors live on its C++ side."""

    def __init__(self, module: Any) -> None:
        self._module = module._c

    def __getitem__(self, key: str) -> Any:
        return self._module.getattr(key)

    def __setitem__(self, key: str, tensor: Any) -> None:
        if forward_ad.unpack_dual(tensor).tangent is not None:  # it would be dropped silently
            raise NotImplementedError(
                "Trying to use forward AD with ScriptModules, but they lose it"
            )
        self._module.setattr(key, tensor)


def kept(selection: Selection) -> Selection:
    """A selection that can be looked at any number of times."""
    return list(selection) if isinstance(selection, Iterator) else selection


def _items(selection: Selection) -> list[Any]:
    if isinstance(selection, Iterable) and not isinstance(selection, str | nn.Module | Tensor):
        return list(selection)
    return [selection]
