"""Empirical risk: a model, a loss and data as weighted scalar functions of a dict of parameters."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from .averaging import SAMPLES, Average
from .batches import Batches, NoDataError, to_device, usable
from .description import Description
from .fingerprint import Fingerprint
from .function import LossFunction, Tensors, Total
from .losses import BatchLoss, Loss, device_of, supervised
from .modules import Inventory, Selection, kept, unwrapped
from .outside import Outside
from .randomness import checked_seed, seed_tensor
from .samples import Positioned
from .weighing import Place, Weigher

Mode = Literal["batch", "full"]


class Term(NamedTuple):
    """One of the functions that a risk is made of, at work on its data: ``function(params, state, *data)``."""

    function: Any  # (params, state, *data) -> 0-dim tensor
    data: tuple[Any, ...]
    weight: float
    label: str  # "batch 3", for messages


class EmpiricalRisk:
    """The average loss of a model over data, batch by batch, as a function of its parameters.

    Parameters
    ----------
    model : nn.Module
        Wrappers (compiled, data parallel, SWA) are looked through. Never changed.
    loss : callable
        ``loss(outputs, targets)`` -> scalar. Parameters of a loss that is a module count too,
        under names that begin with ``loss.``.
    data : iterable of batches
        Read anew for each pass; see `Average` for how batches are weighted.
    average : Average
        `SAMPLES`, `BATCHES`, `TOTAL` or one of your own.
    mode : "batch" or "full"
        Whether each batch is a function of its own or all of the data is one: the same matrix, but
        ``"full"`` needs the memory of all batches at once.
    params : selection
        Which parameters: names, globs, modules, a predicate ``(name, parameter) -> bool``, a mapping
        with names as keys; those that do not require a gradient are left out. All by default.
    seed : int
        Fixes everything random: dropout masks, shuffling, augmentation.

    Examples
    --------
    >>> import torch
    >>> from hvpop.risk import EmpiricalRisk
    >>> data = [(torch.ones(2, 3), torch.zeros(2, 1)), (torch.ones(1, 3), torch.zeros(1, 1))]
    >>> risk = EmpiricalRisk(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> [term.weight for term in risk.terms()]
    [2.0, 1.0]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        *,
        average: Average = SAMPLES,
        mode: Mode = "batch",
        params: Selection = None,
        seed: int = 0,
    ) -> None:
        self._build(model, supervised(loss), data, average, mode, params, seed)
        if isinstance(loss, nn.Module):
            self._roots["loss"] = loss

    @classmethod
    def from_batch_loss(
        cls,
        model: nn.Module,
        batch_loss: BatchLoss,
        data: Any,
        *,
        average: Average = SAMPLES,
        mode: Mode = "batch",
        params: Selection = None,
        seed: int = 0,
    ) -> EmpiricalRisk:
        """The risk of ``batch_loss(model, batch)``, for losses inside the model or batches of any kind.

        A ``batch_loss`` with a method ``weight(model, batch)`` says how much a batch counts;
        otherwise its number of samples is taken.
        """
        risk = cls.__new__(cls)
        risk._build(model, batch_loss, data, average, mode, params, seed)
        return risk

    def _build(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        data: Any,
        average: Average,
        mode: Mode,
        params: Selection,
        seed: int,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if mode not in ("batch", "full"):
            raise ValueError(f"mode must be 'batch' or 'full', got {mode!r}")
        if not isinstance(average, Average):
            raise TypeError(
                f"average must be SAMPLES, BATCHES, TOTAL or Average(...), got {average!r}"
            )
        self.model = unwrapped(model)
        self.batch_loss = batch_loss
        self.average = average
        self.mode = mode
        self.seed = checked_seed(seed)
        self._selection = kept(params)
        self._data = Batches(data, seed)
        self._roots = {"": self.model}
        self._moved = 0
        self._shard = (0, 1)  # the rank, and how many there are
        self._whole = self._positioned = False
        self._weigher = Weigher(average, batch_loss)
        self.function = LossFunction(self._roots, batch_loss, self._weigher)
        self._frozen: tuple[object, EmpiricalRisk] | None = None
        self._live = True
        self._chosen: Tensors = {}

    # -- the point --------------------------------------------------------------------------------

    def parameters(self) -> Tensors:
        """The live parameters that count, by name, in the model's order; tied ones once."""
        if self._live:
            self.function.look()
        self._chosen = self._inventory.trainable(self._selection)
        return self._chosen

    @property
    def _inventory(self) -> Inventory:
        return self.function.now.inventory

    def names(self) -> list[str]:
        """The names of all parameters, those that do not count included."""
        return list(self._inventory.parameters)

    def state(self) -> Tensors:
        """The live tensors that a loss depends on beside `parameters`: buffers, frozen parameters.

        Of the moment when `parameters` was called.
        """
        held = self._inventory.parameters | self._inventory.buffers
        return {name: t.detach() for name, t in held.items() if name not in self._chosen}

    # -- the functions ----------------------------------------------------------------------------

    def terms(self) -> Generator[Term, None, None]:
        """One pass over the data: each batch's function and weight, or in full mode the only one."""
        batches = self._batches()
        if self.mode == "batch":
            yield from batches
            return
        parts = list(batches)
        weights = tuple(part.weight for part in parts)
        data = (weights, [part.data for part in parts])
        yield Term(Total(self.function), data, sum(weights), "all the data")
        self.refuse()

    def _batches(self) -> Generator[Term, None, None]:
        counted, samples, (rank, ranks) = 0, 0, self._shard
        device = device_of(self._inventory.parameters)
        weighed = self._weigher.weighed(self.read(), self.model, self._place)
        for i, (batch, weight) in enumerate(weighed):
            if self._positioned:
                batch = Positioned.at(samples, batch, device)
                samples += len(batch.place)
                batch = batch._replace(place=batch.place * ranks + rank)
            counted += weight > 0
            if weight > 0 or self._whole:  # a mean over nothing (all ignored) is not a number
                seed = seed_tensor(self.seed + i * ranks + rank)
                yield Term(self.loss, (batch, seed), weight, f"batch {i}")
        if counted == 0:
            raise NoDataError("all batches have weight 0, so there is nothing to average")

    def read(self) -> Generator[tuple[Any, Any], None, None]:
        """Each batch as the user holds it, if so, and as it is on the device."""
        device = device_of(self._inventory.parameters)
        for batch in self._data:
            moved = to_device(batch, device)
            self._moved += moved is not batch
            yield batch if self._data.in_memory else None, moved

    def _place(self) -> Place:
        seed = seed_tensor(self.seed)
        live = self.loss
        if not self._live:
            live = LossFunction(self._roots, self.batch_loss, self._weigher)
        return Place(self.loss, live, self._chosen, self.state(), seed, self._inventory.modules)

    def refuse(self) -> None:
        """Raise if evaluations so far have shown that the average is not what it should be."""
        self._weigher.refuse()
        self._weigher.refuse_constants()

    @property
    def loss(self) -> LossFunction:
        """The loss of one batch, a function of parameters, state, batch and seed."""
        return self.function

    @property
    def in_memory(self) -> bool:
        """Whether the user holds all batches anyway, where they are needed."""
        return self._data.in_memory and self._moved == 0

    def place(self, params: Tensors, state: Tensors) -> AbstractContextManager[None]:
        """The context of a whole product at a point, in which each evaluation finds what it needs."""
        return self.function.place(params, state)

    @property
    def plain(self) -> bool:
        """Whether model and loss are made of ordinary parts only, which need no policies."""
        return self.function.now.plain

    def gradient(self, params: Tensors, state: Tensors, batch: Any, seed: Tensor | None) -> Tensors:
        """The gradient of one batch as a training step has it: a plain ``backward()``, no rewrites.

        A reference for checks; zeros for parameters that get none.
        """
        return self.function.gradient(params, state, batch, seed)

    def batchwise(self) -> EmpiricalRisk:
        """The same risk in batch mode."""
        return self._with(mode="batch")

    def whole(self) -> EmpiricalRisk:
        """The same risk in batch mode, whose terms are all batches, those that count nothing too."""
        return self._with(mode="batch", _whole=True)

    def positioned(self) -> EmpiricalRisk:
        """The same risk in batch mode, whose batches know which samples are theirs (`Positioned`)."""
        return self._with(mode="batch", _positioned=True)

    def restricted(self, params: Selection) -> EmpiricalRisk:
        """The same risk as a function of some of its parameters; the others stay as they are."""
        chosen = self.parameters()
        wanted = self._inventory.trainable(params)
        return self._with(_selection=[name for name in chosen if name in wanted])

    def on_shard(self, rank: int, ranks: int) -> EmpiricalRisk:
        """The same risk where other processes have other batches: their random numbers are others."""
        weigher = Weigher(self.average, self.batch_loss, alone=ranks == 1)
        function = LossFunction(self._roots, self.batch_loss, weigher)
        return self._with(_shard=(rank, ranks), _weigher=weigher, function=function)

    def first_batch(self) -> str | None:
        """A checksum of the first batch; None if there is none."""
        return self._data.first()

    def is_random(
        self, term: Term, point: Tensors | None = None, state: Tensors | None = None
    ) -> bool:
        """Whether a batch's loss draws random numbers (dropout, sampling): one forward pass.

        At the live parameters, if no others are given.
        """
        point = self.parameters() if point is None else point
        state = self.state() if state is None else state
        usable_point, usable_state = ({n: usable(t) for n, t in d.items()} for d in (point, state))
        return self.function.draws(usable_point, usable_state, *term.data)

    # -- freezing ---------------------------------------------------------------------------------

    def fingerprint(self) -> tuple[Fingerprint, Any]:
        """What tells whether a matrix made now is still that of the live model."""
        now = Description(self._roots, self.batch_loss)
        tensors = now.inventory.parameters | now.inventory.buffers
        return Fingerprint.of(tensors), now.settings()

    def outside(self) -> Outside:
        """What the loss depends on that `frozen` cannot keep as it is."""
        return Outside(self.function.now)

    def frozen(self) -> EmpiricalRisk:
        """The same functions with every setting of model and loss as it is now.

        The same object as long as these are what they were, so that what strategies know of its
        functions (traces) serves again after a training step.
        """
        now = self.function.look() if self._live else self.function.now
        settings = now.settings()
        if self._frozen is None or self._frozen[0] != settings:
            frozen = self._with(function=self.function.frozen(now), _live=False)
            self._frozen = settings, frozen
        frozen = self._frozen[1]
        frozen.function.now = now
        frozen.parameters()
        return frozen

    def _with(self, **changes: Any) -> EmpiricalRisk:
        copied = copy.copy(self)
        vars(copied).update(_frozen=None, **changes)
        return copied
