"""Batch losses: how a batch, a model and a criterion make one scalar, and what it was divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .batches import tensors_in
from .normalisers import Normaliser, normaliser_of

Loss = Callable[[Any, Any], Tensor]
"""``loss(outputs, targets)`` -> scalar."""


@runtime_checkable
class BatchLoss(Protocol):
    """``batch_loss(model, batch)`` -> scalar.

    One that also has ``weight(model, batch)`` -> float says what it divides by; else the number of
    samples is taken, the length of the batch's first tensor.
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor: ...


class supervised:  # noqa: N801 (used like a function)
    """Batches ``(inputs, targets)``: ``loss(model(inputs), targets)``.

    Inputs that are a mapping or a sequence are spread over the model's arguments; of a longer tuple
    the last item is the target. A batch that is a mapping has its target under the key ``targets``.

    Examples
    --------
    >>> import torch
    >>> from hvpop.risk import supervised
    >>> batch_loss = supervised(torch.nn.MSELoss())
    >>> model = torch.nn.Linear(2, 1)
    >>> batch_loss(model, (torch.ones(3, 2), torch.ones(3, 1))).shape
    torch.Size([])
    """

    def __init__(self, loss: Loss, *, targets: str = "labels") -> None:
        if not callable(loss) or isinstance(loss, type):
            got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
            raise TypeError(f"loss must be callable as loss(outputs, targets), got {got}")
        self.loss = loss
        self.targets = targets

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = self._split(batch)
        if isinstance(inputs, Mapping):
            return self.loss(model(**inputs), targets)
        if isinstance(inputs, list | tuple) and not hasattr(inputs, "_fields"):
            return self.loss(model(*inputs), targets)
        return self.loss(model(inputs), targets)

    @cached_property
    def normaliser(self) -> Normaliser | None:
        """How the loss says that it normalises."""
        return normaliser_of(self.loss)

    def weight(self, model: nn.Module, batch: Any) -> float:
        """What the loss divides by, or the number of samples if that cannot be told."""
        inputs, targets = self._split(batch)
        if self.normaliser is not None and isinstance(targets, Tensor):
            return self.normaliser(targets)
        return samples_in(targets if any(t.ndim for t in tensors_in(targets)) else inputs)

    def _split(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            if self.targets not in batch:
                raise ValueError(
                    f"a batch is a mapping without {self.targets!r} (it has {', '.join(map(str, batch))}); "
                    "name its targets with hvpop.risk.supervised(loss, targets=...)"
                )
            return {k: v for k, v in batch.items() if k != self.targets}, batch[self.targets]
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(
                f"a batch must be (inputs, targets), got {type(batch).__name__}; for other batches use "
                "EmpiricalRisk.from_batch_loss(model, batch_loss, data)"
            )
        *inputs, targets = batch
        return (inputs[0] if len(inputs) == 1 else inputs), targets


class autoencoder:  # noqa: N801
    """Batches of inputs (with or without labels beside them): ``loss(model(inputs), inputs)``."""

    def __init__(self, loss: Loss) -> None:
        self._supervised = supervised(loss)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self._supervised(model, self._pair(batch))

    def weight(self, model: nn.Module, batch: Any) -> float:
        return self._supervised.weight(model, self._pair(batch))

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        return inputs, inputs


class hugging_face:  # noqa: N801
    """Batches that are mappings with labels, for a model that computes its own loss: ``model(**batch).loss``.

    The weight is the number of labels that count: those that are not -100, and for causal language
    models not the first of each sequence, which nothing predicts.
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        loss = model(**batch).loss
        if loss is None:
            raise ValueError(
                f"{type(model).__name__} returned no loss: its batches need labels, "
                f"got {', '.join(map(str, batch))}"
            )
        return loss  # type: ignore[no-any-return]

    def weight(self, model: nn.Module, batch: Any) -> float:
        """The number of labels that count."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return samples_in(batch)
        if labels.is_floating_point():
            return float(labels.numel())
        if labels.ndim > 1 and _predicts_next_tokens(model):
            labels = labels[..., 1:]
        return float((labels != -100).sum())


def _predicts_next_tokens(model: nn.Module) -> bool:
    """Whether the model shifts its labels by one: a decoder with a language modelling head."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    causal = getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    return causal or type(model).__name__.endswith("LMHeadModel")


def knows_divisor(batch_loss: BatchLoss) -> bool:
    """Whether a batch loss can tell what it divides by."""
    if isinstance(batch_loss, autoencoder):
        batch_loss = batch_loss._supervised
    if isinstance(batch_loss, supervised):
        return batch_loss.normaliser is not None
    return hasattr(batch_loss, "weight")


def samples_in(batch: Any) -> float:
    """The number of samples of a batch: the length of its first tensor."""
    for tensor in tensors_in(batch):
        if tensor.ndim > 0:
            return float(tensor.shape[0])
    if hasattr(batch, "__len__") and not isinstance(batch, Tensor):
        return float(len(batch))
    raise ValueError(
        f"cannot tell how many samples a {type(batch).__name__} holds; "
        "pass average=Average(weight=...) with a function of the batch, or BATCHES or TOTAL"
    )


def scalar(value: Any) -> Tensor:
    """The loss as a 0-dim tensor, or an error that says why it is none."""
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss must be a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(
            f"the loss must be a scalar, got shape {tuple(value.shape)}; reduce it, e.g. with .mean()"
        )
    if not value.is_floating_point():
        raise TypeError(f"the loss must be real floating point, got {value.dtype}")
    return value if value.ndim == 0 else value.reshape(())


def device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """The device that batches go to: that of the first parameter."""
    return next(iter(tensors.values())).device
