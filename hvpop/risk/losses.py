"""Batch losses: how a batch, a model and a criterion make one scalar, and what it was divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..interception import Interception
from ..marker import called, inputs, is_cut, outputs
from .batches import arrays_in
from .normalisers import Normaliser, normaliser_of
from .samples import samples_in

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
            way = f"; pass an object: {loss.__name__}()" if isinstance(loss, type) else ""
            raise TypeError(f"loss must be callable as loss(outputs, targets), got {got}{way}")
        if isinstance(loss, supervised | autoencoder | hugging_face):
            raise TypeError(
                f"loss must be callable as loss(outputs, targets), got a {type(loss).__name__}, which takes "
                f"(model, batch); use {_FROM_BATCH_LOSS} and HessianOperator.from_risk(risk)"
            )
        self.loss = loss
        self.targets = targets

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        given, targets = self._split(batch)
        try:
            return self.loss(outputs(_applied(model, given)), targets)
        except Exception as error:
            if advice := _advice(error, targets):
                raise type(error)(f"{error}; {advice}") from error
            raise

    @property
    def normaliser(self) -> Normaliser | None:
        """How the loss says that it normalises, as it is set now."""
        return normaliser_of(self.loss)

    def weight(self, model: nn.Module, batch: Any) -> float:
        """What the loss divides by, or the number of samples if that cannot be told."""
        return self._weight(self.normaliser, batch)

    def _weight(self, normaliser: Normaliser | None, batch: Any) -> float:
        if normaliser and type(batch) in (tuple, list) and batch and type(batch[-1]) is Tensor:
            return normaliser(batch[-1])  # the usual case, sooner
        inputs, targets = self._split(batch)
        if normaliser and isinstance(targets, Tensor):
            return normaliser(targets)
        telling = targets if any(a.ndim for a in arrays_in(targets)) else inputs
        return samples_in((inputs, targets), telling)

    def _split(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            if self.targets not in batch:
                raise ValueError(
                    f"a batch is a mapping without {self.targets!r} (it has {', '.join(map(str, batch))}); "
                    "name its targets with hvpop.risk.supervised(loss, targets=...), or, for a model that "
                    f"computes its own loss, use {_FROM_BATCH_LOSS}"
                )
            return {k: v for k, v in batch.items() if k != self.targets}, batch[self.targets]
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(
                f"a batch must be (inputs, targets), got {type(batch).__name__}; for other batches use "
                f"{_FROM_BATCH_LOSS}"
            )
        *inputs, targets = batch
        return (inputs[0] if len(inputs) == 1 else inputs), targets


def _applied(model: nn.Module, given: Any) -> Any:
    """The model on inputs that are spread over its arguments, if there are several."""
    if isinstance(given, Mapping):
        return model(**{name: inputs(x) for name, x in given.items()})
    if isinstance(given, list | tuple) and not hasattr(given, "_fields"):
        return model(*map(inputs, given))
    return model(inputs(given))


class forward_only:  # noqa: N801
    """Batches as for `supervised`, or without targets: no loss but the sum of all outputs."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            given: Any = {k: v for k, v in batch.items() if k != "labels"}
        elif isinstance(batch, tuple | list):
            given = batch[:-1] if len(batch) > 1 else batch
            given = given[0] if len(given) == 1 else given
        else:
            given = batch
        marked = pytree.tree_leaves(outputs(_applied(model, given)))
        floats = [z for z in marked if isinstance(z, Tensor) and z.is_floating_point()]
        if not floats:
            raise ValueError(f"{type(model).__name__} returned no tensor of floating point")
        return torch.stack([z.sum() for z in floats]).sum()


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
    models not the first of each sequence, which nothing predicts. The outputs are what the model's
    head hands to torch's loss functions: its logits.
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        with Interception(_MARKED) if is_cut() else nullcontext():
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
        shifted = labels.ndim > 1 and _predicts_next_tokens(model)
        return _counted(labels[..., 1:] if shifted else labels)


def _marking(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def marked(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return called(loss, outputs(input), args, kwargs)  # type: ignore[no-any-return]

    return marked


_MARKED = {
    loss: _marking(loss)
    for loss in (
        F.cross_entropy,
        F.mse_loss,
        F.binary_cross_entropy_with_logits,
        F.l1_loss,
        F.smooth_l1_loss,
        F.nll_loss,
    )
}
"""The loss functions of heads that compute their loss themselves."""


def _predicts_next_tokens(model: nn.Module) -> bool:
    """Whether the model shifts its labels by one: a decoder with a language modelling head."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    causal = getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    return causal or type(model).__name__.endswith("LMHeadModel")


def _counted(labels: Tensor) -> float:
    return float((labels != -100).sum())


def _labels(model: nn.Module, batch: Any) -> float:
    labels = batch.get("labels")
    return _counted(labels) if isinstance(labels, Tensor) else 0.0


def _next_labels(model: nn.Module, batch: Any) -> float:
    labels = batch.get("labels")
    return _counted(labels[..., 1:]) if isinstance(labels, Tensor) and labels.ndim > 1 else 0.0


def _answers(model: nn.Module, batch: Any) -> float:
    """The answers that are not cut off: heads for question answering ignore those beyond the text."""
    starts, ids = batch.get("start_positions"), batch.get("input_ids")
    if not isinstance(starts, Tensor) or not isinstance(ids, Tensor):
        return 0.0
    return float((starts < ids.shape[1]).sum())


def rule_of(batch_loss: BatchLoss, model: nn.Module) -> Callable[[Any], float] | None:
    """How a batch loss, as it is set now, weighs a batch; None if it does not say."""
    if isinstance(batch_loss, autoencoder):
        rule = rule_of(batch_loss._supervised, model)
        return rule and (lambda batch: rule(batch_loss._pair(batch)))
    if isinstance(batch_loss, supervised):
        normaliser = batch_loss.normaliser
        return normaliser and (lambda batch: batch_loss._weight(normaliser, batch))
    if isinstance(batch_loss, hugging_face):
        return None  # the heads of models differ
    weight = getattr(batch_loss, "weight", None)
    return weight and (lambda batch: weight(model, batch))


def guesses_of(batch_loss: BatchLoss) -> list[Callable[[nn.Module, Any], float]] | None:
    """What a batch loss may divide by, the likeliest first; None if it is a number of samples."""
    if not isinstance(batch_loss, hugging_face):
        return None
    return [batch_loss.weight, _labels, _next_labels, _answers, lambda _, batch: samples_in(batch)]


def weight_of(batch_loss: BatchLoss, model: nn.Module, batch: Any) -> float:
    """How much a batch counts as long as nothing is proven."""
    weight = getattr(batch_loss, "weight", None)
    return samples_in(batch) if weight is None else float(weight(model, batch))


def checked_batch_loss(batch_loss: Any) -> BatchLoss:
    """A batch loss, or an error that says why it is none."""
    if isinstance(batch_loss, type):
        raise TypeError(
            f"batch_loss must be callable as batch_loss(model, batch), got the class "
            f"{batch_loss.__name__}; pass an object: {batch_loss.__name__}()"
        )
    if not callable(batch_loss):
        raise TypeError(f"batch_loss must be callable, got {type(batch_loss).__name__}")
    if isinstance(batch_loss, nn.modules.loss._Loss):
        raise TypeError(
            f"batch_loss must be callable as batch_loss(model, batch), got {type(batch_loss).__name__}, "
            "which takes (outputs, targets); use EmpiricalRisk(model, loss, data)"
        )
    return batch_loss  # type: ignore[no-any-return]


def _advice(error: Exception, targets: Any) -> str | None:
    """What to do about an error of a loss, where what was passed explains it."""
    if isinstance(error, TypeError) and "not callable" in str(error):
        return (
            "a loss is called as loss(outputs, targets); "
            f"for one that takes (model, batch) use {_FROM_BATCH_LOSS}"
        )
    if type(error) in _OF_TORCH and not getattr(
        targets, "shape", isinstance(targets, list | tuple | Mapping | str)
    ):
        return (
            "the target is a single number: if the data are single samples, put them into batches, "
            "e.g. DataLoader(data, batch_size=64)"
        )
    return None


_OF_TORCH = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)

_FROM_BATCH_LOSS = "EmpiricalRisk.from_batch_loss(model, batch_loss, data)"


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
