"""What a model and its loss are at one pass over the data. All that is decided follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from .losses import BatchLoss
from .modules import Inventory
from .plain import CONVOLUTION_LAYERS, is_plain
from .randomness import generators_in
from .settings import Snapshot, settings_of


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

    @cached_property
    def convolves(self) -> bool:
        """Whether there are layers that rewrites make faster."""
        return any(isinstance(m, CONVOLUTION_LAYERS) for m in self.inventory.modules)

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
