"""Many right-hand sides in one Krylov space."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvpop import Damped, Dense, Diagonal, LinearOperator
from hvpop.solvers import block_cg, cg

from .problems import (
    DEFINITE,
    F32,
    INDEFINITE,
    SINGULAR,
    N,
    dense,
    digits_hessian,
    normal,
    rounding,
)

WELL = {name: spectrum for name, spectrum in DEFINITE.items() if name in ("clustered", "spread")}


def true_residuals(A: LinearOperator, X: Tensor, B: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(B - A.to_dense() @ X, dim=0)
    return norms


@pytest.mark.parametrize("name", DEFINITE)
def test_what_is_called_converged_has_a_small_true_residual(name: str) -> None:
    A, B = dense(DEFINITE[name]), normal(N, 7, seed=3)
    for rtol in (1e-4, 1e-7, 1e-10):
        result = block_cg(A, B, rtol=rtol)
        found = true_residuals(A, result.x, B)
        assert bool((found <= result.residual_norms + rounding(A.matrix, result.x, B)).all())
        norms = torch.linalg.vector_norm(B, dim=0)  # a sum of N squares, in one order or another
        torch.testing.assert_close(result.targets, rtol * norms, rtol=N * 2.0**-52, atol=0.0)
        for norm, target, status in zip(
            result.residual_norms, result.targets, result.status, strict=True
        ):
            assert (status == "converged") == bool(norm <= target)
        if rtol == 1e-4:
            assert result.converged


@pytest.mark.parametrize("name", WELL)
def test_the_answers_are_those_of_dense_algebra(name: str) -> None:
    A, B = dense(WELL[name]), normal(N, 5, seed=4)
    result = block_cg(A, B, rtol=1e-12)
    assert result.converged
    expected = torch.linalg.solve(A.to_dense(), B)
    condition = float(WELL[name].max() / WELL[name].min())
    assert (result.x - expected).norm() <= 2e-12 * condition * expected.norm()


def test_one_column_takes_the_steps_of_cg() -> None:
    A, b = dense(DEFINITE["spread"]), normal(N, seed=5)
    shared, alone = block_cg(A, b, rtol=1e-8), cg(A, b, rtol=1e-8)
    assert shared.x.shape == b.shape
    # the same in exact arithmetic; rounding delays both, though not alike
    assert abs(shared.steps - alone.steps) <= 0.1 * alone.steps
    difference = 2 * 1e-8 * float(b.norm() / DEFINITE["spread"].min())
    assert float((shared.x - alone.x).norm()) <= difference


def test_columns_that_share_need_half_of_the_products_on_the_digits() -> None:
    H = digits_hessian()
    A, B = Damped(H, 1e-3), normal(H.shape[0], 8, seed=6)
    shared, alone = block_cg(A, B, rtol=1e-3), cg(A, B, rtol=1e-3)
    print(f"\n8 systems: {shared.products} products, cg {alone.products}")
    assert shared.converged
    assert alone.converged
    assert shared.products < alone.products / 2


def test_dependent_and_vanishing_columns_do_no_harm() -> None:
    A, B = dense(DEFINITE["spread"]), normal(N, 5, seed=1)
    B[:, 2], B[:, 3] = B[:, 0], 0.0
    B[:, 4] = B[:, 0] + 1e-9 * B[:, 1]
    result = block_cg(A, B, rtol=1e-9)
    assert result.converged
    assert not result.x[:, 3].any()
    assert torch.allclose(result.x[:, 2], result.x[:, 0], rtol=1e-6)


def test_columns_of_all_sizes_converge_by_their_own() -> None:
    A = dense(DEFINITE["spread"])
    B = normal(N, 4, seed=2) * torch.tensor([1e-200, 1e-8, 1.0, 1e150], dtype=torch.float64)
    result = block_cg(A, B, rtol=1e-8)
    assert result.converged
    again = block_cg(A, normal(N, 4, seed=2), rtol=1e-8)
    assert result.steps <= 1.1 * again.steps


@pytest.mark.parametrize("name", SINGULAR)
def test_consistent_singular_systems_are_solved(name: str) -> None:
    A = dense(SINGULAR[name])
    B = A @ normal(N, 4, seed=7)
    result = block_cg(A, B, rtol=1e-8)
    assert result.converged
    found = true_residuals(A, result.x, B)
    assert bool((found <= result.targets + rounding(A.matrix, result.x, B)).all())


@pytest.mark.parametrize("name", INDEFINITE)
def test_negative_curvature_is_reported_with_a_direction(name: str) -> None:
    A = dense(INDEFINITE[name])
    result = block_cg(A, normal(N, 3, seed=8))
    assert set(result.status) == {"negative curvature"}
    assert result.directions is not None
    for d in result.directions.T:
        assert abs(float(d.norm()) - 1) < 1e-12
        assert float(d @ (A @ d)) < 0


def test_more_columns_than_rows() -> None:
    A, B = dense(torch.linspace(1, 3, 6).double()), normal(6, 9, seed=9)
    result = block_cg(A, B, rtol=1e-10)
    assert result.converged
    assert result.steps <= 2


def test_a_start_at_the_solution_takes_no_step() -> None:
    A, B = dense(DEFINITE["clustered"]), normal(N, 3, seed=10)
    X = block_cg(A, B, rtol=1e-10).x
    result = block_cg(A, B, x0=X, rtol=1e-8)
    assert (result.steps, result.products, result.converged) == (0, 3, True)
    assert torch.equal(result.x, X)


def test_a_tolerance_below_the_dtype_stagnates() -> None:
    A, B = dense(DEFINITE["spread"], dtype=F32), normal(N, 3, seed=11, dtype=F32)
    result = block_cg(A, B, rtol=1e-12)
    assert set(result.status) == {"stagnated"}
    # a step and the check of it round, each by up to this
    assert bool((result.residual_norms <= 2 * rounding(A.matrix, result.x, B)).all())


def test_a_singular_system_without_a_solution_ends_and_stays_bounded() -> None:
    A = Diagonal(torch.cat([torch.zeros(5), torch.linspace(0.01, 1, 95)]).double())
    B = 1.0 + normal(100, 3, seed=15)
    result = block_cg(A, B)
    assert set(result.status) == {"stagnated"}
    assert torch.allclose(result.residual_norms, true_residuals(A, result.x, B))
    assert (result.residual_norms < torch.linalg.vector_norm(B, dim=0)).all()


def test_zero_is_the_answer_to_zero_wherever_it_starts() -> None:
    A = Diagonal(torch.linspace(1, 2, 50).double())
    B = torch.cat([torch.zeros(50, 1).double(), normal(50, 1, seed=16)], 1)
    result = block_cg(A, B, x0=torch.ones_like(B))
    assert result.converged
    assert torch.equal(result.x[:, 0], B[:, 0])


def test_the_budget_and_the_callback_end_the_run() -> None:
    A, B = dense(DEFINITE["spread"]), normal(N, 3, seed=12)
    short = block_cg(A, B, max_steps=4)
    assert (short.steps, set(short.status)) == (4, {"max steps"})
    assert torch.allclose(short.residual_norms, true_residuals(A, short.x, B))

    stopped = block_cg(A, B, callback=lambda step: step.number == 3)
    assert (stopped.steps, set(stopped.status)) == (3, {"interrupted"})
    assert short.history.shape == (5, 3)


def test_what_is_given_is_not_written_to() -> None:
    A, B, X0 = dense(DEFINITE["spread"]), normal(N, 3, seed=13), normal(N, 3, seed=14)
    before = B.clone(), X0.clone()
    block_cg(A, B, x0=X0)
    assert torch.equal(B, before[0])
    assert torch.equal(X0, before[1])


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        block_cg(Dense(normal(4, 4)), normal(4))
    with pytest.raises(ValueError, match="shape"):
        block_cg(Diagonal(torch.ones(4).double()), normal(5, 2))
    with pytest.raises(FloatingPointError, match="not finite"):
        block_cg(Diagonal(torch.tensor([1.0, float("inf")]).double()), normal(2, 2))
