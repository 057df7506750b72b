"""The quadratic forms of the batches one by one, of a live Hessian or of a frozen one."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..operators import BatchForms
from ..risk import EmpiricalRisk
from ..strategies import Params
from ..strategies.base import grad_enabled
from ..strategies.fallback import settled
from .diagnosis import culprit
from .space import multiplier, scale_of, to_point

if TYPE_CHECKING:
    from .hessian import HessianOperator
    from .linearized import LinearizedHessian


def batch_forms(
    A: HessianOperator | LinearizedHessian,
    risk: EmpiricalRisk,
    point: Params,
    state: Params,
    V: Tensor,
    batches: int | None,
) -> BatchForms:
    """``v' H_b v`` of the columns of ``V`` for the first batches, or all, none of them joined."""
    risk = risk if risk.mode == "batch" else risk.batchwise()
    scale = scale_of(V, point)
    columns = to_point(V if scale is None else V / scale, A.layout, point)
    multiply = multiplier(columns)

    def one_pass() -> BatchForms:
        values, weights = [], []
        with closing(risk.terms()) as terms:
            for term in islice(terms, batches):
                # No name for the map: its graph is gone before the next batch's is built.
                products = multiply(A.strategy.linearize(term.function, point, state, *term.data))
                values.append(_forms(columns, products))
                weights.append(term.weight)
        return BatchForms(
            torch.stack(values),
            torch.tensor(weights, dtype=torch.float64),
            risk.average.normalized,
        )

    with grad_enabled(), risk.place(point, state):
        found = settled(A.strategy, one_pass)
    if not found.values.isfinite().all():
        why = culprit(risk.terms(), point, state, A.strategy, columns)
        raise FloatingPointError(f"{A!r}: the forms of its batches are not finite; {why}")
    if scale is None:
        return found
    return replace(found, values=found.values * scale.double().square().cpu())


def _forms(columns: Params, products: list[Tensor]) -> Tensor:
    """``v' H_b v`` of each column, ``(k,)``, summed in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for v, product in zip(columns.values(), products, strict=True):
        terms = v.double() * product.double().reshape(v.shape)
        total = total + terms.reshape(len(v), -1).sum(1).cpu()
    return total
