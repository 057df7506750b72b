"""Ops that torch cannot differentiate twice, rewritten with ops that it can.

Some ops of torch have no second derivative, a wrong one, or none in forward mode. While `Rewrites`
is active, each op in the table `REWRITES` is replaced by an equal formula where the torch at hand
needs it (`hvpop.risk.probes`). The table is at the end. So are
convolutions, layer norms and activations, whose second derivative is right but slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _torch
from ..interception import Interception, Table
from .formulas import arithmetic, distances, embeddings, losses, recurrent, spectra
from .formulas.activations import ACTIVATIONS
from .formulas.convolutions import CONVOLUTIONS
from .formulas.normalization import NORMALIZATION
from .probes import PROBES, Needed

Op = Callable[..., Any]


class Rewrites(Interception):
    """Context in which ops of `REWRITES`, and convolutions, norms and activations that gain by it, are evaluated by formulas.

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
        super().__init__(*(TABLES if seen is None else [_noting(t, seen) for t in TABLES]))


def _noting(table: Table, seen: set[str]) -> Table:
    def noting(op: Callable[..., Any], rewrite: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = rewrite(*args, **kwargs)
            if result is not None:
                seen.add(op.__name__)
            return result

        return noted

    return {op: noting(op, rewrite) for op, rewrite in table.items()}


def _in_torchs_words(table: dict[Op, Op]) -> dict[Op, Op]:
    """The table with formulas that leave it to torch to say what is wrong with their arguments."""

    def checked(op: Op, formula: Op) -> Op:
        @wraps(formula)
        def rewritten(*args: Any, **kwargs: Any) -> Any:
            try:
                return formula(*args, **kwargs)
            except Exception:
                op(*args, **kwargs)
                raise  # torch can do it, so it is the formula's own

        return rewritten

    return {op: checked(op, formula) for op, formula in table.items()}


def _where_needed(table: dict[Op, Op]) -> dict[Op, Op]:
    """The table with formulas that leave ops alone which torch differentiates as well."""

    def tried(formula: Op, needed: Needed) -> Op:
        @wraps(formula)
        def rewritten(*args: Any, **kwargs: Any) -> Any:
            device = next((a.device for a in args if isinstance(a, Tensor)), None)
            return formula(*args, **kwargs) if device is None or needed(device) else None

        return rewritten

    found: dict[Op, Op] = {}
    for op, formula in table.items():
        if op in PROBES:
            needed = Needed(op, formula, PROBES[op])
        found[op] = tried(formula, needed)
    return found


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
    torch.cdist: distances.cdist,  # reverse (except p=2 with many points), forward
    torch.pdist: distances.pdist,  # reverse, forward
    torch.scatter_reduce: arithmetic.scatter_reduce,  # "prod": forward is WRONG, without an error
    torch.Tensor.scatter_reduce: arithmetic.scatter_reduce,
    torch.Tensor.scatter_reduce_: arithmetic.scatter_reduce_,
    torch.index_reduce: arithmetic.index_reduce,  # "prod" with zeros: reverse; forward
    torch.Tensor.index_reduce: arithmetic.index_reduce,
    torch.Tensor.index_reduce_: arithmetic.index_reduce_,
    torch.renorm: arithmetic.renorm,  # of zeros: reverse, forward
    torch.Tensor.renorm: arithmetic.renorm,
    torch.Tensor.renorm_: arithmetic.renorm_,
    torch.lstm: recurrent.lstm,  # cuDNN's kernels: reverse, forward
    torch.gru: recurrent.gru,
    torch.rnn_tanh: recurrent.rnn_tanh,
    torch.rnn_relu: recurrent.rnn_relu,
    torch.cholesky_inverse: arithmetic.cholesky_inverse,  # forward is WRONG, without an error
    torch.Tensor.cholesky_inverse: arithmetic.cholesky_inverse,
    _torch.linear_cross_entropy: losses.linear_cross_entropy,  # in chunks: reverse is WRONG; forward
    torch.sinc: arithmetic.sinc,  # at 0: reverse, forward is WRONG, without an error
    torch.special.sinc: arithmetic.sinc,
    torch.Tensor.sinc: arithmetic.sinc,
    torch.Tensor.sinc_: arithmetic.sinc_,
    torch.logaddexp: arithmetic.logaddexp,  # of infinite numbers: reverse, forward
    torch.Tensor.logaddexp: arithmetic.logaddexp,
    torch.native_layer_norm: arithmetic.native_layer_norm,  # bias without weight: reverse
    torch.triangular_solve: arithmetic.triangular_solve,  # forward is WRONG, without an error
    torch.Tensor.triangular_solve: arithmetic.triangular_solve,
    torch.linalg.svdvals: spectra.svdvals,  # WRONG where values are equal, without an error
    torch.linalg.eigvalsh: spectra.eigvalsh,
    torch.linalg.svd: spectra.linalg_svd,
    torch.svd: spectra.svd,
    torch.Tensor.svd: spectra.svd,
    torch.linalg.eigh: spectra.eigh,
    torch.linalg.matrix_norm: spectra.matrix_norm,
    torch.linalg.norm: spectra.linalg_norm,
    torch.linalg.cond: spectra.cond,
    torch.norm: spectra.norm,
    torch.Tensor.norm: spectra.norm,
    torch.nuclear_norm: spectra.nuclear_norm,
}

REWRITES.pop(_torch.missing, None)
REWRITES.update(_where_needed(_in_torchs_words(REWRITES)))

TABLES: tuple[Table, ...] = (REWRITES, CONVOLUTIONS, NORMALIZATION, ACTIVATIONS)
"""Of what has to be evaluated by formulas, and of what gains by it."""
