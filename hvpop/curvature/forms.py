"""The quadratic forms of the batches one by one, of which an operator is the average."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import torch
from torch import Tensor

from ..operators import BatchForms
from ..risk import EmpiricalRisk
from ..strategies import HVPStrategy, Params
from .space import multiplier


def batch_forms(
    risk: EmpiricalRisk,
    strategy: HVPStrategy,
    point: Params,
    state: Params,
    columns: Params,
    batches: int | None,
) -> BatchForms:
    """``v' A_b v`` of some columns for the first batches, or all, none of them joined."""
    risk = risk if risk.mode == "batch" else risk.batchwise()
    multiply = multiplier(columns)
    values, weights = [], []
    with closing(risk.terms()) as terms:
        for term in islice(terms, batches):
            # No name for the map: its graph is gone before the next batch's is built.
            products = multiply(strategy.linearize(term.function, point, state, *term.data))
            values.append(_forms(columns, products))
            weights.append(term.weight)
    weighed = torch.tensor(weights, dtype=torch.float64)
    return BatchForms(torch.stack(values), weighed, risk.average.normalized)


def _forms(columns: Params, products: list[Tensor]) -> Tensor:
    """``v' A_b v`` of each column, ``(k,)``, summed in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for v, product in zip(columns.values(), products, strict=True):
        terms = v.double() * product.double().reshape(v.shape)
        total = total + terms.reshape(len(v), -1).sum(1).cpu()
    return total
