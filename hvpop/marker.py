"""Where a loss meets its model: a mark that is the identity, unless derivatives are taken apart there."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

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


def is_cut() -> bool:
    """Whether marks count."""
    return _HERE.cut is not None


class Cut(Exchange):
    """While it is active, a loss is handed leaves in place of what is marked; both are remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []  # as the model has made them
        self.leaves: list[Tensor] = []  # as the loss has seen them

    def _change(self) -> None:
        self._noted(setattr, _HERE, "cut", _HERE.cut)
        _HERE.cut = self

    def marked(self, z: T) -> T:
        return pytree.tree_map(self._handed, z)  # type: ignore[no-any-return]

    def _handed(self, thing: Any) -> Any:
        if not isinstance(thing, Tensor) or not thing.is_floating_point():
            return thing
        if any(thing is leaf for leaf in self.leaves):
            return thing  # marked before
        leaf = thing.detach().requires_grad_()
        self.outputs.append(thing)
        self.leaves.append(leaf)
        return leaf


class _Here(threading.local):
    cut: Cut | None = None


_HERE = _Here()
