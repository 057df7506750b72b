"""The Gauss-Newton matrix of an empirical risk as a linear operator."""

from __future__ import annotations

from ..strategies import HVPStrategy
from ..strategies.through_outputs import ThroughOutputs, loss_hessian
from .live import Live


class GaussNewtonOperator(Live):
    """The generalized Gauss-Newton matrix ``J' B J`` of a model's average loss over data.

    J is the Jacobian of the model's outputs, B the Hessian of the loss in them (Schraudolph 2002):
    the Hessian without the curvature of the model, and positive semidefinite where the loss is convex
    in its outputs. Of batches it is ``sum_b w_b J_b' B_b J_b / sum_b w_b``, which is the same for
    every split of the data. It is all else that a `HessianOperator` is: live, linearized, in blocks.

    Parameters
    ----------
    model, loss, data, strategy, mode, average, params, seed
        As in `HessianOperator`. Where outputs meet the loss `supervised`, `autoencoder` and
        `hugging_face` say themselves; a batch loss of your own marks them with `outputs`.

    Raises
    ------
    ValueError
        For a loss that marks no outputs, or that reaches parameters past them (a penalty).

    Notes
    -----
    A kept product takes 4 matrix products a layer where a gradient takes 3, a live one 5. ``B`` is
    as indefinite as the loss is: it is never clamped.

    Examples
    --------
    >>> import torch
    >>> from hvpop import GaussNewtonOperator
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    >>> data = [(X, torch.zeros(2, 1, dtype=torch.float64))]
    >>> G = GaussNewtonOperator(model, torch.nn.MSELoss(), data)
    >>> G.to_dense()  # of a linear model the Hessian, 2 X'X / n
    tensor([[2., 2.],
            [2., 4.]], dtype=torch.float64)
    """

    def _matrix(self, strategy: HVPStrategy) -> HVPStrategy:
        return ThroughOutputs(strategy, loss_hessian)
