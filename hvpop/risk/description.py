"""What a model and its loss are at one pass over the data. All that is decided follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor, nn

from .formulas import activations, normalization
from .losses import BatchLoss
from .modules import Inventory
from .plain import BENT_LAYERS, CONVOLUTION_LAYERS, is_plain
from .randomness import generators_in
from .settings import Snapshot, settings_of

MANY = min(activations.SMALL, normalization.SMALL)
"""Numbers in a layer from which on it pays to look at what it calls."""


@dataclass(frozen=True)
class Description:
    """Made anew at each pass, and never changed."""

    roots: Mapping[str, nn.Module]
    batch_loss: BatchLoss
    inventory: Inventory = field(init=False)
    plain: bool = field(init=False)  # of ordinary parts only, which need no policies

    def __post_init__(self) -> None:
        object.__setattr__(self, "inventory", Inventory(self.roots))
        loss = getattr(self.batch_loss, "loss", None)
        layers = [m for m in self.inventory.modules if m is not loss]
        object.__setattr__(self, "plain", is_plain(layers, loss))

    def gains(self, batch: Any) -> bool:
        """Whether rewrites make ordinary layers faster on a batch, be it that they only look at its size."""
        return self._convolves or (self._widest > 0 and _rows(batch) * self._widest >= MANY)

    @cached_property
    def _convolves(self) -> bool:
        return any(isinstance(m, CONVOLUTION_LAYERS) for m in self.inventory.modules)

    @cached_property
    def _widest(self) -> int:
        """The most numbers that a layer makes of a row; 0 where none of them goes through what is rewritten."""
        if not any(isinstance(m, BENT_LAYERS) for m in self.inventory.modules):
            return 0
        return max(
            (p.shape[0] for p in self.inventory.parameters.values() if p.dim() > 0), default=0
        )

    @cached_property
    def generators(self) -> list[Any]:
        """Sources of random numbers of the model's own."""
        return generators_in(self.inventory.modules)

    def settings(self) -> Any:
        """All but the values of parameters and buffers: equal as long as nothing has been set."""
        slots = [(key, name) for _, key, name in self.inventory.slots]
        return slots, settings_of(*self.inventory.modules, self.batch_loss)

    def snapshot(self) -> Snapshot:
        """The settings, to be put in place again when the user has changed them."""
        held = self.inventory
        holders = [*held.modules, self.batch_loss, getattr(self.batch_loss, "loss", None)]
        return Snapshot(holders, [*held.parameters.values(), *held.buffers.values()])


def _rows(batch: Any) -> int:
    """How many rows the first tensor of a batch has."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    return prod(first.shape[:-1]) if isinstance(first, Tensor) else 0
