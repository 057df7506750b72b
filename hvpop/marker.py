"""Where a loss meets its model: marks that are the identity, unless derivatives are taken apart there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from .exchange import Exchange

T = TypeVar("T")


def outputs(z: T) -> T:
    """Mark ``z`` as what the model hands to the loss; returns it as it is.

    Matrices such as Gauss-Newton's are of a loss as a function of its model's outputs, and have to
    know which those are. `supervised`, `autoencoder` and `hugging_face` mark them by themselves; a
    batch loss of your own says where.

    Parameters
    ----------
    z
        A tensor, or tuples, lists and dicts of such.

    Examples
    --------
    >>> import torch
    >>> from hvpop import EmpiricalRisk, GaussNewtonOperator, outputs
    >>> def batch_loss(model, batch):
    ...     return (outputs(model(batch)) ** 2).mean()
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> data = [torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)]
    >>> risk = EmpiricalRisk.from_batch_loss(model, batch_loss, data)
    >>> GaussNewtonOperator.from_risk(risk).to_dense()
    tensor([[2., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    return z if _HERE.cut is None else _HERE.cut.marked(z)


def inputs(x: T) -> T:
    """Mark ``x`` as what a model is fed with; returns it as it is.

    `HessianOperator.mixed` differentiates by what is marked. `supervised` marks by itself; a batch
    loss of your own says where: ``loss(model(inputs(x)), y)``.

    Parameters
    ----------
    x
        A tensor that runs over samples along its first dimension, or tuples, lists and dicts of such.

    Examples
    --------
    >>> import torch
    >>> from hvpop import EmpiricalRisk, HessianOperator, inputs
    >>> def batch_loss(model, batch):
    ...     return (model(inputs(batch)) ** 2).mean()
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> data = [torch.tensor([[1.0], [2.0]], dtype=torch.float64)]
    >>> H = HessianOperator.from_risk(EmpiricalRisk.from_batch_loss(model, batch_loss, data))
    >>> H.mixed().to_dense()  # d/dx of w x^2, which is 2 w x
    tensor([[2., 4.]], dtype=torch.float64)
    """
    return x if _HERE.cut is None else _HERE.cut.fed(x)


def is_cut() -> bool:
    """Whether marks count."""
    return _HERE.cut is not None


def is_watched() -> bool:
    """Whether calls of loss functions count as well."""
    return _HERE.cut is not None and _HERE.cut.watching


def called(loss: Callable[..., Any], z: Tensor, args: Any, kwargs: Any) -> Any:
    """``loss(z, *args, **kwargs)``, seen by a cut that watches."""
    if _HERE.cut is None or not _HERE.cut.watching:
        return loss(z, *args, **kwargs)
    return _HERE.cut.called(loss, z, args, kwargs)


class Call(NamedTuple):
    """A loss function of torch's at work on what the model has made."""

    loss: Callable[..., Any]
    input: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Any


class Cutting(NamedTuple):
    """Where a loss is cut off from its model."""

    watching: bool = False  # remember the calls of torch's loss functions
    at_calls: bool = False  # cut at what these are handed, instead of at what is marked
    at_inputs: bool = False  # cut the model off from what it is fed with, instead


AT_MARKS = Cutting()


class Cut(Exchange):
    """While it is active, a loss is handed leaves in place of what is marked; both are remembered."""

    def __init__(
        self, cutting: Cutting = AT_MARKS, handing: Sequence[Tensor | None] | None = None
    ) -> None:
        super().__init__()
        self._handing = handing or ()  # what is handed on in place of what the model has made
        self.watching, self._at_calls, self._at_inputs = cutting
        self.outputs: list[Tensor] = []  # as the model has made them
        self.leaves: list[Tensor] = []  # as the loss has seen them
        self.calls: list[Call] = []

    def _change(self) -> None:
        self._set(_HERE, "cut", self)

    def marked(self, z: T) -> T:
        elsewhere = self._at_calls or self._at_inputs
        return z if elsewhere else pytree.tree_map(self._handed, z)

    def fed(self, x: T) -> T:
        return pytree.tree_map(self._handed, x) if self._at_inputs else x

    def called(self, loss: Callable[..., Any], z: Tensor, args: Any, kwargs: Any) -> Any:
        handed = self._handed(z) if self._at_calls else z
        value = loss(handed, *args, **kwargs)
        self.calls.append(Call(loss, handed, args, kwargs, value))
        return value

    def _handed(self, thing: Any) -> Any:
        if not isinstance(thing, Tensor) or not thing.is_floating_point():
            if isinstance(thing, Tensor) and thing.is_complex() and thing.requires_grad:
                raise ValueError(_COMPLEX)
            return thing
        if any(thing is leaf for leaf in self.leaves):
            return thing  # marked before
        given = self._handing[len(self.leaves)] if len(self.leaves) < len(self._handing) else None
        if given is None or given.numel() != thing.numel():  # of one sample, squeezed, they fit
            given = thing
        leaf = given.detach().requires_grad_()
        self.outputs.append(thing)
        self.leaves.append(leaf)
        return leaf


_COMPLEX = (
    "an output of the model is complex, and Jacobians are of real ones: let it return "
    "torch.view_as_real(z), and the loss put the parts together"
)


class _Here(threading.local):
    cut: Cut | None = None


_HERE = _Here()
