"""Empirical risk: a model, a loss and data as weighted scalar functions of a dict of parameters."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .averaging import SAMPLES, Average
from .batches import Batches, to_device, usable
from .fingerprint import Fingerprint
from .formulas.recurrent import without_cudnn
from .losses import BatchLoss, Loss, device_of, scalar, supervised
from .modules import ONE_THREAD, Inventory, Selection, kept, unwrapped
from .plain import CONVOLUTION_LAYERS, is_plain
from .policies import TwiceDifferentiable
from .randomness import Seeded, SeededThroughout, checked_seed, seed_tensor, torch_states
from .rewrites import Rewrites
from .settings import settings_of
from .strays import Substitution, leaves_of, reaches_past
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
        self._rewrites = Rewrites()
        self._weigher = Weigher(average, batch_loss)
        self._plain = False
        self._convolves = False
        self._has_strays: bool | None = None  # not known before the first evaluation
        self._draws_beside_torch: bool | None = None  # likewise
        self._policies = TwiceDifferentiable()
        self._frozen: tuple[object, EmpiricalRisk] | None = None
        self._inventory = Inventory(self._roots)

    # -- the point --------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """The live parameters that count, by name, in the model's order; tied ones once."""
        with ONE_THREAD:
            self._inventory = Inventory(self._roots)
        loss = getattr(self.batch_loss, "loss", None)
        layers = [m for m in self._inventory.modules if m is not loss]
        self._plain = is_plain(layers, loss)
        self._convolves = self._plain and any(isinstance(m, CONVOLUTION_LAYERS) for m in layers)
        self._chosen = self._inventory.trainable(self._selection)
        return self._chosen

    def names(self) -> list[str]:
        """The names of all parameters, those that do not count included."""
        return list(self._inventory.parameters)

    def state(self) -> dict[str, Tensor]:
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
        yield Term(self.total, data, sum(weights), "all the data")
        self.refuse()

    def _batches(self) -> Generator[Term, None, None]:
        counted = 0
        weighed = self._weigher.weighed(self._read(), self.model, self._place)
        for i, (batch, weight) in enumerate(weighed):
            if weight > 0:  # a mean over nothing (all targets ignored) is not a number
                counted += 1
                yield Term(self.loss, (batch, seed_tensor(self.seed + i)), weight, f"batch {i}")
        if counted == 0:
            raise ValueError("all batches have weight 0, so there is nothing to average")

    def _read(self) -> Generator[tuple[Any, Any], None, None]:
        """Each batch as the user holds it, if so, and as it is on the device."""
        device = device_of(self._inventory.parameters)
        for batch in self._data:
            moved = to_device(batch, device)
            self._moved += moved is not batch
            yield batch if self._data.in_memory else None, moved

    def _place(self) -> Place:
        seed = seed_tensor(self.seed)
        return Place(self.loss, self._chosen, self.state(), seed, self._inventory.modules)

    def refuse(self) -> None:
        """Raise if evaluations so far have shown that the average is not what it should be."""
        self._weigher.refuse()
        self._weigher.refuse_constants()

    def loss(
        self, params: dict[str, Tensor], state: dict[str, Tensor], batch: Any, seed: Tensor | None
    ) -> Tensor:
        """The loss of one batch at ``params``: a 0-dim tensor. The model is as before afterwards."""
        if self._plain:
            live = self._inventory.parameters
            in_place = not state and all(live.get(n) is p for n, p in params.items())
            with (
                nullcontext() if in_place else self._inventory.holding(state | params),
                self._rewrites if self._convolves else nullcontext(),
            ):
                value = scalar(self.batch_loss(self.model, batch))
                self._weigher.observe(value, params)
                return value
        value = self._evaluated(params, state, batch, seed)
        if self._has_strays is None:
            live = self._inventory.parameters
            replaced = {n: live[n] for n, p in params.items() if n in live and live[n] is not p}
            if replaced:
                self._has_strays = reaches_past(value, replaced)
                if self._has_strays:
                    return self._evaluated(params, state, batch, seed)
        return value

    def _evaluated(
        self, params: dict[str, Tensor], state: dict[str, Tensor], batch: Any, seed: Tensor | None
    ) -> Tensor:
        buffers = self._inventory.buffers
        held = {n: t.clone() if n in buffers else t for n, t in state.items()} | params
        randomness = self._randomness(seed)
        with ExitStack() as contexts:
            contexts.enter_context(self._policies)
            contexts.enter_context(self._inventory.holding(held))
            contexts.enter_context(randomness)
            contexts.enter_context(self._rewrites)
            contexts.enter_context(self._weigher.watch)
            if self._has_strays:
                contexts.enter_context(Substitution(self._inventory.parameters, held))
            value = scalar(self.batch_loss(self.model, batch))
        if isinstance(randomness, SeededThroughout):
            self._draws_beside_torch = randomness.needed
        self._weigher.observe(value, params)
        return value

    def _randomness(self, seed: Tensor | None) -> Seeded:
        if self._draws_beside_torch is False:
            return Seeded(seed)
        return SeededThroughout(seed, self._inventory.modules)

    def total(
        self,
        params: dict[str, Tensor],
        state: dict[str, Tensor],
        weights: tuple[float, ...],
        data: list[tuple[Any, Tensor]],
    ) -> Tensor:
        """The weighted mean of the batch losses, as one function."""
        losses = (
            w * self.loss(params, state, *batch) for w, batch in zip(weights, data, strict=True)
        )
        return torch.stack(list(losses)).sum() / sum(weights)

    @property
    def in_memory(self) -> bool:
        """Whether the user holds all batches anyway, where they are needed."""
        return self._data.in_memory and self._moved == 0

    @property
    def policies(self) -> AbstractContextManager[object]:
        """The context of a whole product, in which its evaluations find what they need."""
        return ONE_THREAD if self._plain else self._policies

    @property
    def plain(self) -> bool:
        """Whether model and loss are made of ordinary parts only, which need no policies."""
        return self._plain

    def gradient(
        self, params: dict[str, Tensor], state: dict[str, Tensor], batch: Any, seed: Tensor | None
    ) -> dict[str, Tensor]:
        """The gradient of one batch as a training step has it: a plain ``backward()``, no rewrites.

        A reference for checks; zeros for parameters that get none.
        """
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        buffers = self._inventory.buffers
        held = {n: t.clone() if n in buffers else t for n, t in state.items()} | leaves
        with ExitStack() as contexts:
            contexts.enter_context(self._inventory.holding(held))
            contexts.enter_context(self._randomness(seed))
            if self._inventory.recurrent:  # cuDNN has no derivative of these in eval mode
                contexts.enter_context(without_cudnn())
            if self._has_strays:
                contexts.enter_context(Substitution(self._inventory.parameters, held))
            loss = scalar(self.batch_loss(self.model, batch))
            others = [t for t in leaves_of(loss) if not any(t is leaf for leaf in leaves.values())]
            kept = [(t, t.grad) for t in others]  # what a loss closes over gets gradients, too
            try:
                for t in others:
                    t.grad = None
                loss.backward()
            finally:
                for t, grad in kept:
                    t.grad = grad
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}

    def batchwise(self) -> EmpiricalRisk:
        """The same risk in batch mode."""
        risk = self._copy()
        risk.mode = "batch"
        return risk

    def restricted(self, params: Selection) -> EmpiricalRisk:
        """The same risk as a function of some of its parameters; the others stay as they are."""
        chosen = self.parameters()
        risk = self._copy()
        wanted = self._inventory.trainable(params)
        risk._selection = [name for name in chosen if name in wanted]
        return risk

    def is_random(self, term: Term) -> bool:
        """Whether a batch's loss draws random numbers (dropout, sampling): one forward pass."""
        batch, seed = term.data
        live = self.parameters(), self.state()
        point, state = ({n: usable(t) for n, t in tensors.items()} for tensors in live)
        if self._draws_beside_torch is None:
            self.loss(point, state, batch, seed)
        if self._draws_beside_torch:
            return True
        with Seeded(seed):
            before = torch_states()
            self.loss(point, state, batch, None)
            return not all(map(torch.equal, before, torch_states()))

    # -- freezing ---------------------------------------------------------------------------------

    def fingerprint(self) -> Fingerprint:
        """What tells whether a matrix made now is still that of the live model."""
        with ONE_THREAD:
            inventory = Inventory(self._roots)
        return Fingerprint.of(inventory.parameters | inventory.buffers)

    def frozen(self) -> EmpiricalRisk:
        """The same functions with every module in train or eval mode as it is now.

        The same object as long as modules and loss are what they were, so that what strategies know
        of its functions (traces) serves again after a training step.
        """
        self.parameters()
        modules = self._inventory.modules
        settings = [*(settings_of(m, 1) for m in modules), settings_of(self.batch_loss, 4)]
        if self._frozen is None or self._frozen[0] != settings:
            frozen = self._copy()
            modes = [(module, module.training) for module in modules]
            frozen._policies = TwiceDifferentiable(modes)
            self._frozen = settings, frozen
        frozen = self._frozen[1]
        frozen.parameters()
        return frozen

    def _copy(self) -> EmpiricalRisk:
        copied = copy.copy(self)
        copied._frozen = None
        return copied
