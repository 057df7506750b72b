"""The Gauss-Newton matrix of an empirical risk as a linear operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..marker import Cutting
from ..risk import terms
from ..risk.likelihoods import Softmax
from ..strategies import HVPStrategy, ScalarFunction
from ..strategies.parted import Parted, Tensors
from ..strategies.referee import generic
from ..strategies.rounding import agree, reordered, rounding
from ..strategies.through_outputs import ThroughOutputs, Times, loss_hessian
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
        return ThroughOutputs(strategy, _LossHessian())


class _LossHessian:
    """``B``, the second derivative of the loss in the outputs; of a cross entropy by its probabilities."""

    cutting = Cutting(watching=True)

    def __init__(self) -> None:
        self._known: ScalarFunction | None = None  # of which it was seen whether that is right
        self._right = False

    def __call__(self, parted: Parted) -> Times:
        closed = cross_entropy_hessian(parted) if self._known == parted.fn and self._right else None
        return loss_hessian(parted) if closed is None else closed

    def prove(self, parted: Parted) -> None:
        closed = None if self._known == parted.fn else cross_entropy_hessian(parted)
        if closed is None:
            return
        s = generic({"z": parted.leaves[0]})["z"]
        (found,), (truth,) = closed([s], None), loss_hessian(parted)([s], None)
        if bool((truth != 0).any()):  # of nothing but ignored targets there is nothing to compare
            self._known = parted.fn
            self._right = agree([found], [truth], reordered(rounding([truth])))


def cross_entropy_hessian(parted: Parted) -> Times | None:
    """``diag(p) - p p'`` by what each target counts; None if the loss is not just that of the outputs."""
    if len(parted.calls) != 1 or len(parted.leaves) != 1:
        return None
    call = parted.calls[0]
    if (
        call.loss is not F.cross_entropy
        or call.value is not parted.loss
        or call.input is not parted.leaves[0]
        or not parted.loss.requires_grad
    ):
        return None
    likelihood = Softmax(call)
    if likelihood.refusal() is not None or likelihood.given["target"].is_floating_point():
        return None
    parted.refuse_beside()
    share = terms.shares(call, torch.ones_like(parted.loss))
    p, dim = likelihood.p, min(1, likelihood.z.ndim - 1) - likelihood.z.ndim
    weighted = share.unsqueeze(dim) * p

    def times(s: Tensors, k: int | None) -> Tensors:
        q: Tensor = weighted * s[0]
        return [q.addcmul_(p, q.sum(dim, keepdim=True), value=-1)]

    return times
