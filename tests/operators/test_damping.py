"""Damping: three ways to say how much, and rules of one's own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from hvpop import Damped, Dense, HessianOperator, Identity

from .registry import (
    F64,
    HESSIAN_DAMPING,
    LevenbergMarquardt,
    LiveDense,
    NamedDense,
    entries,
    hessian,
    symmetric,
)

S = symmetric(4)[0]
x = entries(4)


def test_damping_by_a_number_is_exact_in_the_operators_precision() -> None:
    assert torch.equal(
        Damped(Identity(2), 0.1) @ torch.ones(2, dtype=F64), torch.full((2,), 1.1, dtype=F64)
    )


def test_damping_by_name_takes_the_first_match_and_leaves_the_rest_alone() -> None:
    zero = NamedDense(torch.zeros(4, 4, dtype=F64))
    by_name = Damped(zero, {"net.bias": 0.1, "net.*": 2.0})
    assert by_name.to_dense().diagonal().tolist() == [2.0, 2.0, 0.1, 0.0]
    assert Damped(zero, {"*": 3.0}).to_dense().diagonal().tolist() == [3.0] * 4


def test_damping_by_entry_takes_tensors_arrays_and_lists_and_keeps_its_own_copy() -> None:
    d = x.abs()
    expected = S.to_dense() + d.diag()
    given: list[Any] = [d.clone(), d.numpy().copy(), d.tolist(), np.flip(d.numpy()[::-1].copy())]
    for damping in given:
        operator = Damped(S, damping)
        damping[0] = 99.0
        assert torch.equal(operator.to_dense(), expected)


def test_the_damping_of_a_live_hessian_is_live() -> None:
    H = copy.deepcopy(hessian()[0])
    assert isinstance(H, HessianOperator)
    operator = Damped(H, {"0.weight": 0.5, "0.*": 2.0})
    before = operator.to_dense()
    with torch.no_grad():
        for parameter in H.risk.parameters().values():
            parameter.mul_(1.5)
    after = operator.to_dense()
    assert (after - before).norm() > 1e-3
    assert torch.allclose(after - H.to_dense(), HESSIAN_DAMPING.double().diag(), atol=1e-14)


def test_a_subclass_of_damped_survives_linearizing_with_its_attributes() -> None:
    live = LevenbergMarquardt(LiveDense(entries(4, 4)), strength=0.3)
    live.note = "kept"  # type: ignore[attr-defined]
    frozen = live.linearize()
    assert type(frozen) is LevenbergMarquardt
    assert frozen is not live
    assert type(frozen.operator) is Dense
    assert (frozen.strength, frozen.note) == (0.3, "kept")  # type: ignore[attr-defined]
    assert torch.equal(frozen.to_dense(), live.to_dense())
    assert type(live.operator) is LiveDense
