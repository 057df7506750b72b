"""Every matrix over data is, over processes, what it is on one: checks and errors too; or it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from hvpop import FisherOperator, GradientOperator, HessianOperator, Identity, JacobianOperator
from hvpop.distributed import DataParallel, Sharded, Team
from hvpop.spectrum import eigsh, trace

from . import problems, worlds

X, Y = problems.X[:36], problems.Y[:36]


def mine(rank: int, ranks: int) -> list[Any]:
    """Every so many-th sample, in batches of three."""
    x, y = X[rank::ranks], Y[rank::ranks]
    return list(zip(x.split(3), y.split(3), strict=True))


def every(ranks: int) -> list[Any]:
    """The batches of all processes."""
    return [batch for rank in range(ranks) for batch in mine(rank, ranks)]


def hessian(data: list[Any]) -> HessianOperator:
    return HessianOperator(problems.model(), nn.CrossEntropyLoss(), data)


# -- checks -----------------------------------------------------------------------------------------


def checked(team: Team, how: str) -> tuple[str, str]:
    data = [] if team.rank == 2 and how == "empty" else mine(team.rank, team.size)
    if how == "wrong" and team.rank == 1:
        data[0] = (data[0][0] * torch.inf, data[0][1])
    H = DataParallel(hessian(data))
    result = H.drive(lambda A: A.check()) if how == "driven" else H.check()
    return result.verdict, str([(f.level, f.what, f.detail) for f in result.findings])


@pytest.mark.parametrize("how", ["whole", "empty", "driven"])
def test_a_check_says_what_one_process_says(how: str) -> None:
    alone = hessian(every(3)).check()
    for verdict, findings in worlds.all_of(checked, 3, how):
        assert verdict == alone.verdict == "healthy"
        assert all(finding.what in findings for finding in alone.findings)
        assert "rank" not in findings


def test_a_check_says_on_which_process_something_is_wrong() -> None:
    said = worlds.all_of(checked, 2, "wrong")
    assert said[0] == said[1]
    verdict, findings = said[0]
    assert verdict.startswith("do not trust this operator yet: loss")
    assert "nan in batch 0 (rank 1)" in findings


# -- errors that come of draws and of data ----------------------------------------------------------


def draws(team: Team) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = mine(team.rank, team.size)
    F = FisherOperator(problems.model(), nn.CrossEntropyLoss(), data, samples=5)
    A = DataParallel(F)
    V = problems.columns(A.shape[0], 3)
    driven = A.drive(lambda A: A.sampling_error(V[:, 0].numpy()))
    return (A @ V).numpy(), A.sampling_error(V).numpy(), driven


@pytest.mark.parametrize("ranks", [2, 4])
def test_draws_of_targets_and_their_error_are_those_of_one_process(ranks: int) -> None:
    batches = list(zip(X.split(9), Y.split(9), strict=True))  # how they are cut does not matter
    alone = FisherOperator(problems.model(), nn.CrossEntropyLoss(), batches, samples=5)
    V = problems.columns(alone.shape[0], 3)
    product, error = (alone @ V).numpy(), alone.sampling_error(V).numpy()
    for found, spread, driven in worlds.all_of(draws, ranks):
        np.testing.assert_allclose(found, product, rtol=0, atol=1e-12 * abs(product).max())
        np.testing.assert_allclose(spread, error, rtol=1e-12)
        np.testing.assert_allclose(driven, error[0], rtol=1e-12)


def no_draws(team: Team) -> None:
    A = DataParallel(hessian(mine(team.rank, team.size)))
    A.sampling_error(problems.columns(A.shape[0], 1))


def test_a_matrix_without_draws_has_no_error_of_them() -> None:
    for outcome in worlds.run(no_draws, 2):
        assert outcome.error == "TypeError"
        assert "expected a live FisherOperator(..., samples=2 or more)" in outcome.message


def data_errors(team: Team) -> list[float]:
    H = DataParallel(hessian(mine(team.rank, team.size)))
    return [e for A in (H, Sharded(H)) for e in errors(A)]


def errors(A: Any) -> list[float]:
    damped = A + 0.5 * Identity.like(A)
    pairs = eigsh(damped, 2, rtol=1e-10, data_error=True)
    estimate = trace(damped, method="hutchinson", rtol=None, max_products=8, data_error=True)
    assert pairs.data_errors is not None
    assert estimate.data_error is not None
    return [*pairs.eigenvalues.tolist(), *pairs.data_errors.tolist(), estimate.data_error]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_error_of_the_data_is_that_of_one_process_with_whole_vectors_and_with_parts(
    ranks: int,
) -> None:
    alone = errors(hessian(every(ranks)))
    for found in worlds.all_of(data_errors, ranks):
        np.testing.assert_allclose(found, alone * 2, rtol=1e-8)


# -- rectangular ones -------------------------------------------------------------------------------


def rectangular(team: Team) -> list[Any]:
    data = mine(team.rank, team.size)
    G = GradientOperator(problems.model(), nn.CrossEntropyLoss(), data)
    J = JacobianOperator(problems.model(), data)
    said: list[Any] = []
    for A in (G, J):
        with pytest.raises(TypeError) as refused:
            DataParallel(A)  # type: ignore[arg-type]
        said.append(str(refused.value))
    total = G.T @ torch.ones(G.shape[0], dtype=torch.float64)
    dist.all_reduce(total)
    return [*said, total.numpy()]


def test_rows_of_data_are_refused_with_advice_that_is_right() -> None:
    alone = GradientOperator(problems.model(), nn.CrossEntropyLoss(), every(2))
    expected = (alone.T @ torch.ones(36, dtype=torch.float64)).numpy()
    for gradients, jacobian, total in worlds.all_of(rectangular, 2):
        assert "got <18x43 GradientOperator" in gradients
        assert "got <54x43 JacobianOperator" in jacobian
        assert "torch.distributed.all_reduce(A.T @ u)" in gradients
        np.testing.assert_allclose(total, expected, rtol=0, atol=1e-12 * abs(expected).max())
