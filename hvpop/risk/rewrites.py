"""Ops that torch cannot differentiate twice, rewritten with ops that it can.

Some ops of torch have no second derivative, a wrong one, or none in forward mode. While `Rewrites`
is active, each op in the table `REWRITES` is replaced by an equal formula. The table is at the end.
So are convolutions, whose second derivative is right but slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..interception import Interception, Table
from .formulas import arithmetic, embeddings, losses, recurrent
from .formulas.convolutions import CONVOLUTIONS


class Rewrites(Interception):
    """Context in which ops of `REWRITES`, and convolutions that gain by it, are evaluated by formulas.

    Values and first derivatives equal those of the op to rounding, with torch's own convention at
    kinks; second derivatives are exact, in reverse and in forward mode. Scripted code is not seen.

    Parameters
    ----------
    seen : set of str, optional
        Receives the name of each op that was rewritten.

    Examples
    --------
    >>> import torch
    >>> x, v, seen = torch.tensor([0.5, 4.0], requires_grad=True), torch.tensor([1.0, 1.0]), set()
    >>> with Rewrites(seen):
    ...     loss = torch.nn.functional.hardsigmoid(x).square().sum()
    >>> (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    >>> torch.autograd.grad(gradient, x, v)[0] * 18
    tensor([1., 0.])
    >>> seen
    {'hardsigmoid'}
    """

    def __init__(self, seen: set[str] | None = None) -> None:
        tables: list[Table] = [REWRITES, CONVOLUTIONS]
        super().__init__(*(tables if seen is None else [_noting(t, seen) for t in tables]))


def _noting(table: Table, seen: set[str]) -> Table:
    def noting(op: Callable[..., Any], rewrite: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = rewrite(*args, **kwargs)
            if result is not None:
                seen.add(op.__name__)
            return result

        return noted

    return {op: noting(op, rewrite) for op, rewrite in table.items()}


# --- the table --------------------------------------------------------------------------------
# One line per op, and one case in the tests. "reverse": no double backward, or a wrong one;
# "forward": forward mode over the gradient raises, or is wrong.

REWRITES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.hardsigmoid: arithmetic.hardsigmoid,  # reverse, forward
    F.mse_loss: losses.mse_loss,  # forward: raises with reduction="mean" and a constant target
    F.huber_loss: losses.huber_loss,  # forward
    F.l1_loss: losses.l1_loss,  # a mode loses its weight
    F.soft_margin_loss: losses.soft_margin_loss,  # forward
    F.multi_margin_loss: losses.multi_margin_loss,  # reverse, forward
    F.multilabel_margin_loss: losses.multilabel_margin_loss,  # reverse, forward
    F.ctc_loss: losses.ctc_loss,  # reverse, forward
    torch.ctc_loss: losses.torch_ctc_loss,
    F.embedding: embeddings.embedding,  # sparse: reverse, forward; padding_idx: forward ignores it
    torch.embedding: embeddings.torch_embedding,
    F.embedding_bag: embeddings.embedding_bag,  # reverse, forward
    torch._weight_norm: arithmetic.weight_norm,  # reverse is WRONG, without an error; forward
    torch.cdist: arithmetic.cdist,  # reverse (except p=2 with many points), forward
    torch.pdist: arithmetic.pdist,  # reverse, forward
    torch.scatter_reduce: arithmetic.scatter_reduce,  # "prod": forward is WRONG, without an error
    torch.Tensor.scatter_reduce: arithmetic.scatter_reduce,
    torch.Tensor.scatter_reduce_: arithmetic.scatter_reduce_,
    torch.lstm: recurrent.lstm,  # cuDNN's kernels: reverse, forward
    torch.gru: recurrent.gru,
    torch.rnn_tanh: recurrent.rnn_tanh,
    torch.rnn_relu: recurrent.rnn_relu,
    torch.cholesky_inverse: arithmetic.cholesky_inverse,  # forward is WRONG, without an error
    torch.Tensor.cholesky_inverse: arithmetic.cholesky_inverse,
}
