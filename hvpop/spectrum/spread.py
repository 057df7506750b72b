"""The error that comes from the data being a sample, told by the spread over their batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..operators import BatchForms, LinearOperator, probes
from .results import Eigenpairs, Estimate


def required(who: str, A: LinearOperator) -> None:
    """Refuse an operator whose data error cannot be known, before there is work that would be lost.

    Costs a product of the first two batches, which is not counted.
    """
    _forms(who, A, _signs(A, 1, "two batches"), batches=2)


def of_eigenvalues(who: str, A: LinearOperator, found: Eigenpairs) -> Eigenpairs:
    """``found`` with its data errors, by a pass over the data, unless Ctrl-C came or comes.

    An eigenvalue moves by ``q' dA q`` to first order.
    """
    if found.status == "interrupted":
        return found
    try:
        errors = _forms(who, A, found.eigenvectors).standard_error()
    except KeyboardInterrupt:
        return replace(found, status="interrupted")
    products = found.products + errors.shape[0]
    return replace(found, data_errors=errors.to(found.eigenvalues), products=products)


def of_trace(A: LinearOperator, found: Estimate, count: int, seed: int) -> Estimate:
    """``found`` with its data error, by a pass over the data, unless Ctrl-C came or comes."""
    if found.status == "interrupted":
        return found
    count = max(4, count)
    try:
        influence = _forms("trace", A, _signs(A, count, "trace", seed)).influence()
    except KeyboardInterrupt:
        return replace(found, status="interrupted")
    error = _variance_of_traces(influence).sqrt().item()
    return replace(found, data_error=error, products=found.products + count)


def _variance_of_traces(influence: Tensor) -> Tensor:
    """The variance of the trace over samples of the data, from forms of probes ``(batches, count)``.

    A form is the batch's trace plus a noise that is independent from probe to probe, so that the
    mean product of two different probes' forms has no share of it. Where that mean does not exceed
    its own error, by the jackknife over probes (Tukey 1958), the error is returned: the data error
    is too large then, but never far too small, as an estimate around zero would be.
    """
    count = influence.shape[1]
    products = influence.T @ influence
    products.fill_diagonal_(0.0)
    mean = products.sum() / (count * (count - 1))
    without = (products.sum() - 2 * products.sum(1)) / ((count - 1) * (count - 2))  # each probe
    error = ((count - 1) * without.var(correction=0)).sqrt()
    return torch.maximum(mean, error)


def _forms(who: str, A: LinearOperator, V: Tensor, batches: int | None = None) -> BatchForms:
    forms = A.batch_forms(V, batches=batches)
    if forms is None:
        raise ValueError(
            f"{who} with data_error=True expects an average over data (a HessianOperator, or one "
            f"scaled, shifted or damped), got {A!r}; leave data_error out"
        )
    if forms.weights.shape[0] < 2:
        raise ValueError(
            f"{who} with data_error=True expects data in two batches or more, got one batch in "
            f"{A!r}; split the data into smaller ones"
        )
    return forms


def _signs(A: LinearOperator, count: int, *place: object) -> Tensor:
    return probes.signs(A.space, count, "data error", *place)
