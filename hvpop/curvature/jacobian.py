"""The Jacobian of a model's outputs in its parameters, as a linear operator."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from ..risk import TOTAL, EmpiricalRisk
from ..risk.losses import forward_only
from ..risk.modules import Selection
from ..strategies import HVPStrategy
from .rows import Outputs
from .stacked import Stacked


class JacobianOperator(Stacked):
    """The derivatives of a model's outputs on data by its parameters: ``J`` of shape ``(N C, n)``.

    A product ``J v`` costs what a tangent pass costs, one with the transpose a gradient: one pass over
    the data each, in the memory of one batch, never formed. Rows are the entries of the outputs, sample
    after sample in the order of the data; columns are entries of `layout`.

    Parameters
    ----------
    model : nn.Module
        As in `EmpiricalRisk`. Outputs may be any pytree; of several tensors, the rows of a sample are
        those of all.
    data : iterable of batches
        ``(inputs, targets)`` as for a loss, whose targets are not looked at, or inputs alone.
    strategy, params, seed
        As in `HessianOperator`. ``strategy`` says how ``J v`` is made.

    Raises
    ------
    ValueError
        For outputs that are no floating point tensors, or of which several do not run over the
        samples of a batch.

    Notes
    -----
    With B the block diagonal of the Hessians of the loss in the outputs of each batch, ``J.T @ B @ J``
    is the `GaussNewtonOperator`. BatchNorm in train mode makes outputs depend on the other samples of
    their batch, and J has that in it.

    Examples
    --------
    >>> import torch
    >>> from hvpop import JacobianOperator
    >>> model = torch.nn.Linear(2, 1).double()
    >>> X = torch.tensor([[1.0, 0.0], [3.0, 2.0]], dtype=torch.float64)
    >>> J = JacobianOperator(model, [X])
    >>> J
    <2x3 JacobianOperator float64 cpu>
    >>> J.to_dense()  # x and 1
    tensor([[1., 0., 1.],
            [3., 2., 1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        strategy: HVPStrategy | None = None,
        params: Selection = None,
        seed: int = 0,
    ) -> None:
        risk = EmpiricalRisk.from_batch_loss(
            model, forward_only(), data, average=TOTAL, params=params, seed=seed
        )
        self._build(risk, Outputs(), strategy)

    @classmethod
    def from_risk(cls, risk: EmpiricalRisk, *, strategy: HVPStrategy | None = None) -> Self:
        """The Jacobian of what a risk marks as outputs of its model."""
        operator = cls.__new__(cls)
        operator._build(risk, Outputs(), strategy)
        return operator
