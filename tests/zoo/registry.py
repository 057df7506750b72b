"""A case of the zoo: a name, a builder of a small problem, and what its product must be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Reference = Literal["difference", "double backward", "laws"]


@dataclass(frozen=True)
class Problem:
    """Model, loss and batches as a user has them.

    Either ``loss(outputs, targets)`` on batches ``(inputs, targets)``, or
    ``batch_loss(model, batch)`` on batches of any form.
    """

    model: nn.Module
    data: list[Any]
    loss: Callable[..., Any] | None = None
    batch_loss: Callable[[Any, Any], Any] | None = None
    weights: Sequence[float] | None = None  # of the batches in the mean; None: their samples
    expected: Callable[[Tensor], Tensor] | None = None  # v (n,) -> H v (n,), in closed form
    hugging_face: bool = False  # the loss is the one that the model returns
    exactly: Callable[[], AbstractContextManager[Any]] = nullcontext  # around the reference

    def value(self, batch: Any) -> Tensor:
        """Return the loss of one batch, computed as the user's training loop would."""
        with self.exactly():
            value = self._value(batch)
        assert isinstance(value, Tensor)
        return value.reshape(())

    def _value(self, batch: Any) -> Any:
        if self.hugging_face:
            return self.model(**batch).loss
        if self.batch_loss is not None:
            return self.batch_loss(self.model, batch)
        assert self.loss is not None
        inputs, targets = batch
        if isinstance(inputs, dict):
            return self.loss(self.model(**inputs), targets)
        if isinstance(inputs, tuple):
            return self.loss(self.model(*inputs), targets)
        return self.loss(self.model(inputs), targets)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is differentiated: trainable, tied ones once, those of a criterion last."""
        roots = [self.model, *([self.loss] if isinstance(self.loss, nn.Module) else [])]
        found = {id(p): p for root in roots for p in root.parameters() if p.requires_grad}
        return list(found.values())

    def batch_weights(self) -> list[float]:
        """Return the weight of each batch: the given ones, or the number of samples."""
        if self.weights is not None:
            return [float(weight) for weight in self.weights]
        return [float(_first_tensor(batch).shape[0]) for batch in self.data]


@dataclass(frozen=True)
class Case:
    """One entry of the zoo.

    ``reference`` says what decides: a finite difference of gradients; double backward, where the
    gradient is by convention not the derivative of the loss (stop-gradients); or only the laws
    (linear, symmetric, repeatable), where the model is random.
    """

    name: str
    family: str
    build: Callable[[], Problem]
    refused: str | None = None  # regular expression of the documented refusal
    warns: str | None = None  # regular expression of the documented warning
    reference: Reference = "difference"
    seed: int = 0  # of the build; another one where 0 puts a kink within the reference's reach
    symmetric: bool = True  # not so where an op's backward is by definition no derivative
    total: bool = False  # sum the batches instead of averaging them
    caller: Callable[[], AbstractContextManager[Any]] = nullcontext  # where the user calls from
    tolerance: float = 1e-7  # relative, against the reference
    agreement: float = 1e-10  # relative, of live and linearized, vector and block


CASES: dict[str, Case] = {}


def case(name: str, **tags: Any) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Register the builder under ``name``; its family is the file that calls this."""
    family = sys._getframe(1).f_globals["__name__"].rpartition("cases_")[2]

    def register(build: Callable[[], Problem]) -> Callable[[], Problem]:
        if name in CASES:
            raise ValueError(f"two cases are named {name!r}")
        CASES[name] = Case(name, family, build, **tags)
        return build

    return register


def _first_tensor(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if hasattr(batch, "values") else batch
    return _first_tensor(next(iter(parts)))
