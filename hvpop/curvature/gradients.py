"""The gradients of samples, as the rows of a matrix."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..exchange import guarded
from ..risk import SAMPLES, Average, EmpiricalRisk
from ..risk.losses import Loss
from ..risk.modules import Selection
from ..strategies import HVPStrategy
from .rows import Rows
from .stacked import Stacked
from .terms import Per, Terms


class GradientOperator(Stacked):
    """The gradients of the samples of a model's average loss, as rows: ``G`` of shape ``(N, n)``.

    A product ``G v`` costs what a tangent pass costs, one with the transpose a gradient: one pass over
    the data each, in the memory of one batch, never formed. Row ``i`` is the i-th sample in the order of
    the data, column ``j`` the j-th entry of `layout`. `weights` tells what the rows count:
    ``G.T @ weights`` is the gradient, and ``G.T @ Diagonal(weights) @ G`` the `EmpiricalFisherOperator`.

    Parameters
    ----------
    model, loss, data, per, strategy, average, params, seed
        As in `EmpiricalFisherOperator`. ``strategy`` says how ``G v`` is made.

    Raises
    ------
    ValueError
        As `EmpiricalFisherOperator`, at the first product; for batches that do not say how many
        samples they hold, when it is made.

    Notes
    -----
    Terms that count nothing (ignored targets) have rows of zeros. Follows the live model;
    `linearize` takes it as it is now, and keeps what products need, as far as memory allows.

    Examples
    --------
    >>> import torch
    >>> from hvpop import GradientOperator
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> X = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    >>> G = GradientOperator(model, torch.nn.MSELoss(), [(X, torch.zeros(2, 1, dtype=torch.float64))])
    >>> G
    <2x2 GradientOperator float64 cpu>
    >>> G.to_dense()  # 2 x'w x
    tensor([[2., 0.],
            [4., 4.]], dtype=torch.float64)
    >>> G.T @ G.weights
    tensor([3., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        *,
        per: Per = "sample",
        strategy: HVPStrategy | None = None,
        average: Average = SAMPLES,
        params: Selection = None,
        seed: int = 0,
    ) -> None:
        risk = EmpiricalRisk(model, loss, data, average=average, params=params, seed=seed)
        self._build(risk, Terms(per), strategy)

    @classmethod
    def from_risk(
        cls, risk: EmpiricalRisk, *, strategy: HVPStrategy | None = None, per: Per = "sample"
    ) -> Self:
        """The gradients of a risk that was made before."""
        operator = cls.__new__(cls)
        operator._build(risk, Terms(per), strategy)
        return operator

    @property
    def weights(self) -> Tensor:
        """What each row counts, ``(N,)``; of an average they add up to 1. Takes a pass."""

        def found() -> Tensor:
            made = self._maps(self._place())
            pieces = [(p.weight, cast(Rows, p.linear.rows).weights) for p in made]
            total = sum(weight for weight, _ in pieces) if self.risk.average.normalized else 1.0
            return torch.cat([weight / total * own for weight, own in pieces]).detach()

        return guarded(found)
