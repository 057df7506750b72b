"""Products over shards are those of all the data, in two collectives."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from torch import nn

from hvpop import LinearOperator
from hvpop.distributed import DataParallel, Team

from . import problems, worlds

CASES = [(s, a) for s in problems.SIZES for a in problems.AVERAGES]


def operator(team: Team, matrix: str, sizes: str, average: str) -> Any:
    data = problems.held(sizes, team.rank, team.size)
    kind = problems.MATRICES[matrix]
    A = kind(problems.model(), nn.CrossEntropyLoss(), data, average=problems.AVERAGES[average])
    return DataParallel(A)


def products(team: Team, matrix: str) -> dict[Any, Any]:
    """Everything at once, since a world takes a while to start."""
    found = {}
    for sizes, average in CASES:
        A = operator(team, matrix, sizes, average)
        for how, B in (("live", A), ("linearized", A.linearize())):
            for k in (1, 8):
                B @ problems.columns(B.shape[0], k)
                before = B.traffic.collectives
                Z = B @ problems.columns(B.shape[0], k)
                found[sizes, average, how, k] = Z.numpy(), B.traffic.collectives - before
    return found


@cache
def truth(matrix: str, sizes: str, average: str) -> np.ndarray:
    return problems.dense(matrix, problems.whole(sizes), average)


@pytest.mark.parametrize("matrix", problems.MATRICES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_products_are_those_of_all_the_data_in_two_collectives(ranks: int, matrix: str) -> None:
    found = worlds.all_of(products, ranks, matrix)
    for (sizes, average, how, k), (Z, collectives) in found[0].items():
        A = truth(matrix, sizes, average)
        expected = A @ problems.columns(len(A), k).numpy()
        error = abs(Z - expected).max() / abs(expected).max()
        assert error <= 1e-12, (sizes, average, how, k, error)
        assert collectives == (2 if ranks > 1 else 0)
    for other in found[1:]:
        for key, (Z, _) in other.items():
            assert (found[0][key][0] == Z).all()


def test_an_operator_over_shards_is_an_operator() -> None:
    assert all(worlds.all_of(composed, 2))


def composed(team: Team) -> bool:
    A = operator(team, "Hessian", "ragged", "SAMPLES")
    B: LinearOperator = 2 * A.linearize() + A.block("*")
    V = problems.columns(A.shape[0], 2)
    return bool(abs(B @ V - 3 * (A @ V)).max() < 1e-12)
