"""The empirical Fisher matrix of an empirical risk as a linear operator."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..risk import EmpiricalRisk
from ..risk.losses import Loss
from ..strategies import HVPStrategy
from ..strategies.through_outputs import ThroughOutputs
from .live import Live
from .rows import SecondMoment
from .terms import Per, Terms


class EmpiricalFisherOperator(Live):
    """The weighted mean of ``g_i g_i'`` over the gradients of the terms of a model's average loss.

    Positive semidefinite whatever the loss. It is no approximation of curvature away from a fit that
    explains the data (Kunstner, Balles and Hennig 2019); as the second moment of gradients it is what
    it says. Of batches it is ``sum_i w_i g_i g_i' / sum_i w_i`` over all terms, which is the same for
    every split of the data. It is all else that a `HessianOperator` is: live, linearized, in blocks.

    Parameters
    ----------
    model, loss, data, strategy, average, params, seed
        As in `GaussNewtonOperator`.
    per : "sample" or "term"
        Whose gradients these are. A sample's own loss is that of a batch of it alone, and counts what
        that batch would (its tokens, its class weight). A term is each number that a loss function
        of torch's averages: a token's cross entropy, the square of one entry. These are different
        matrices, unless a sample has a single term.

    Raises
    ------
    ValueError
        For samples that see each other, as with BatchNorm in train mode; for losses that are no mean
        of terms, mark no outputs, or reach parameters past them (a penalty).

    Notes
    -----
    A product costs what one of Gauss-Newton's does. Linearized, after a few products the gradients of
    samples are kept themselves where they take less memory than graphs, as of convolutions: products
    are two reads of them from then on. Of a loss that is more than one call of a mean of
    torch's, each batch is evaluated once more, by parts, at every new point: to see what its samples
    count. Of a loss that adds up its samples, under ``average=TOTAL``, it is ``sum_i g_i g_i'``; of one
    that adds up terms and divides by samples, ``F.mse_loss(z, y, reduction="sum") / len(y)``, by term it
    is ``sum_i g_i g_i' / N`` for N samples.

    Examples
    --------
    >>> import torch
    >>> from hvpop import EmpiricalFisherOperator
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> X = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    >>> data = [(X, torch.zeros(2, 1, dtype=torch.float64))]
    >>> F = EmpiricalFisherOperator(model, torch.nn.MSELoss(), data)
    >>> F.to_dense()  # g = 2 x'w x, (2, 0) and (4, 4)
    tensor([[10.,  8.],
            [ 8.,  8.]], dtype=torch.float64)
    """

    def __init__(
        self, model: nn.Module, loss: Loss, data: Any, *, per: Per = "sample", **options: Any
    ) -> None:
        self._which(per)
        super().__init__(model, loss, data, **options)

    def _which(self, per: Per = "sample") -> None:
        self._terms = Terms(per)

    def _kind(self) -> str:
        return "" if self._terms.per == "sample" else "(per='term')"

    def _build(self, risk: EmpiricalRisk, strategy: HVPStrategy | None) -> None:
        super()._build(risk.batchwise(), strategy)

    def _matrix(self, strategy: HVPStrategy) -> HVPStrategy:
        return ThroughOutputs(strategy, SecondMoment(self._terms))
