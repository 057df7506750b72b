"""What every solver of systems promises: answers by their true residual, an honest status."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvpop import Dense, LinearOperator
from hvpop.solvers import SolveResult, Step, cg, lsmr, minres

from .problems import (
    DEFINITE,
    EPS,
    F32,
    F64,
    INDEFINITE,
    SINGULAR,
    N,
    Watched,
    dense,
    matrix,
    normal,
    powers,
    rounding,
)

Solver = Callable[..., SolveResult]
SOLVERS = pytest.mark.parametrize("solve", [cg, minres, lsmr])
SYMMETRIC = pytest.mark.parametrize("solve", [cg, minres])


def residuals(A: LinearOperator, b: Tensor, x: Tensor) -> Tensor:
    """In the working precision, by the entries of ``A`` and not by what a solver says."""
    assert isinstance(A, Dense)
    R: Tensor = torch.linalg.vector_norm(b - A.matrix @ x, dim=0)
    return R


def solved(A: LinearOperator, b: Tensor, x: Tensor, rtol: float) -> Tensor:
    """Which columns meet the tolerance, but for the rounding of computing their residuals again."""
    assert isinstance(A, Dense)
    return residuals(A, b, x) <= rtol * b.norm(dim=0) + rounding(A.matrix, x, b)


@pytest.mark.parametrize("spectrum", [*DEFINITE, *SINGULAR])
@SYMMETRIC
def test_definite_and_singular_consistent_systems_are_solved_to_the_true_residual(
    solve: Solver, spectrum: str
) -> None:
    A = dense({**DEFINITE, **SINGULAR}[spectrum])
    b = A @ normal(N, 3)
    # 1e-7 is 10 n steps away from a condition number of 1e8
    result = solve(A, b, rtol=1e-7, max_steps=4000)
    assert result.converged
    assert bool(solved(A, b, result.x, 1e-7).all())
    differences = (result.residual_norms - residuals(A, b, result.x)).abs()
    assert bool((differences <= rounding(A.matrix, result.x, b)).all())


@pytest.mark.parametrize("spectrum", INDEFINITE)
def test_minres_solves_indefinite_systems_to_the_true_residual(spectrum: str) -> None:
    A = dense(INDEFINITE[spectrum])
    b = A @ normal(N, 3)
    result = minres(A, b, rtol=1e-6, max_steps=4000)
    assert result.converged
    assert bool(solved(A, b, result.x, 1e-6).all())


@pytest.mark.parametrize("spectrum", [*DEFINITE, *INDEFINITE])
def test_a_small_tolerance_of_the_residual_means_a_small_error(spectrum: str) -> None:
    eigenvalues = {**DEFINITE, **INDEFINITE}[spectrum]
    if eigenvalues.abs().min() < 1e-4 * eigenvalues.abs().max():
        eigenvalues = eigenvalues.sign() * eigenvalues.abs().clamp_min(1e-2)
        eigenvalues[eigenvalues == 0] = 1.0
    A, x = dense(eigenvalues), normal(N)
    result = minres(A, A @ x, rtol=1e-11, max_steps=4000)
    condition = float(eigenvalues.abs().max() / eigenvalues.abs().min())
    assert result.converged
    assert float((result.x - x).norm() / x.norm()) <= 1e-11 * condition


@SYMMETRIC
def test_condition_1e8_with_a_right_hand_side_of_all_eigenvectors(solve: Solver) -> None:
    A, b = dense(powers(-8, 40)), normal(40)
    result = solve(A, b, rtol=1e-6, max_steps=20000)
    assert result.converged
    assert bool(solved(A, b, result.x, 1e-6))


@pytest.mark.parametrize("shape", [(60, 30), (30, 60), (40, 40)])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_lsmr_agrees_with_the_normal_equations(shape: tuple[int, int], damping: float) -> None:
    M, B = normal(*shape), normal(shape[0], 2, seed=1)
    if damping:
        expected = torch.linalg.solve(M.T @ M + damping * torch.eye(shape[1], dtype=F64), M.T @ B)
    else:
        expected = torch.linalg.pinv(M) @ B
    # a gradient is known up to the rounding of the residual, times the matrix: the square one needs it
    floor = torch.linalg.matrix_norm(M, 2) * rounding(M, expected, B)
    right = (M.T @ B).norm(dim=0)
    rtol = max(1e-12, 5 * float((floor / right).max()))
    result = lsmr(Dense(M), B, damping=damping, rtol=rtol)
    assert result.converged
    gradient = (M.T @ (B - M @ result.x) - damping * result.x).norm(dim=0)
    assert bool((gradient <= rtol * right + floor).all())
    # an error is the gradient times the inverse of M'M
    lowest = torch.linalg.svdvals(M).min() ** 2 + damping
    assert bool(((result.x - expected).norm(dim=0) <= (rtol * right + 2 * floor) / lowest).all())
    torch.testing.assert_close(result.residual_norms, (B - M @ result.x).norm(dim=0))


def test_lsmr_finds_the_shortest_solution_of_a_rank_deficient_problem() -> None:
    M = normal(50, 8) @ normal(8, 30, seed=1)
    b = normal(50, seed=2)
    result = lsmr(Dense(M), b, rtol=1e-12)
    assert result.converged
    torch.testing.assert_close(
        result.x, torch.linalg.pinv(M, rtol=1e-10) @ b, rtol=1e-9, atol=1e-11
    )


@SYMMETRIC
def test_one_vector_and_one_column_give_the_same(solve: Solver) -> None:
    A, b = dense(powers(-3)), normal(N)
    vector, block = solve(A, b), solve(A, b.unsqueeze(1))
    assert vector.x.shape == (N,)
    assert block.x.shape == (N, 1)
    torch.testing.assert_close(vector.x, block.x[:, 0])
    assert vector.status == block.status == ("converged",)


@SOLVERS
def test_columns_share_passes_and_drop_out_when_they_are_done(solve: Solver) -> None:
    M, Q = matrix(powers(-3))
    A = Watched(Dense(M, symmetric=True))
    easy, hard = Q[:, -1], normal(N)  # an eigenvector takes one step
    result = solve(A.operator, torch.stack([easy, hard, easy], 1), rtol=1e-6, max_steps=3000)
    assert result.converged
    assert result.products == A.products
    per_step = 2 if solve is lsmr else 1
    assert result.steps * per_step <= A.passes <= result.steps * per_step + 8
    assert A.widths[0] == 3
    assert A.widths.count(1) >= 0.9 * (result.steps - 2) * per_step
    assert bool(result.history[2:, [0, 2]].isnan().all())


@SOLVERS
def test_stagnation_at_the_floor_of_float32_is_recognised(solve: Solver) -> None:
    A = dense(torch.linspace(1, 10, N), dtype=F32)
    b = normal(N, 2, dtype=F32)
    result = solve(A, b, rtol=1e-12)
    assert set(result.status) == {"stagnated"}
    assert result.steps < N
    # what it stopped at is the rounding of one product: n eps |A| |x|, more for A'A
    floor = N * 1.2e-7 * 10 * result.x.norm(dim=0) * (10 if solve is lsmr else 1)
    assert bool((residuals(A, b, result.x) <= floor).all())


@SOLVERS
def test_a_tolerance_that_float32_can_meet_is_met(solve: Solver) -> None:
    A = dense(torch.linspace(1, 100, N), dtype=F32)
    b = normal(N, 2, dtype=F32)
    result = solve(A, b, rtol=1e-4)
    assert result.converged
    assert result.x.dtype is F32
    if solve is not lsmr:
        assert bool(solved(A, b, result.x, 1e-4).all())


@pytest.mark.parametrize("seed", range(2))
@SOLVERS
def test_converged_is_never_said_of_a_residual_above_the_target(solve: Solver, seed: int) -> None:
    """In float32, across tolerances that can and cannot be met, on an ill-conditioned matrix."""
    A = dense(powers(-3), seed=seed, dtype=F32)
    b = normal(N, 4, seed=seed, dtype=F32)
    for rtol in (1e-3, 1e-5, 3e-6):
        result = solve(A, b, rtol=rtol, max_steps=300)
        R, right = b.double() - A.matrix.double() @ result.x.double(), b.norm(dim=0)
        # what rounding makes of a residual in float32, by computing one; the norm of A is 1
        unsure = 4 * (R - (b - A.matrix @ result.x)).norm(dim=0)
        norms = R.norm(dim=0)
        if solve is lsmr:
            norms, right = (A.matrix.double().T @ R).norm(dim=0), (A.matrix.T @ b).norm(dim=0)
        good = torch.tensor([status == "converged" for status in result.status])
        assert bool((norms <= rtol * right + unsure)[good].all())
        assert bool((norms > rtol * right - unsure)[~good].all())


def test_an_inconsistent_system_stagnates_at_the_least_squares_solution_of_minres() -> None:
    M, Q = matrix(SINGULAR["rank deficient"])
    b = normal(N)
    result = minres(Dense(M, symmetric=True), b, rtol=1e-8)
    unreachable = (Q[:, :40].T @ b).norm()
    assert result.status == ("stagnated",)
    # above it by the square of what is left in the range, where no eigenvalue is below 1
    left = (M @ (b - M @ result.x)).norm() / unreachable
    assert float(left) < 1e-2
    torch.testing.assert_close(
        result.residual_norms[0], unreachable, rtol=float(left.square()) + N * EPS, atol=0
    )
    # the last step into the null space is rounding over a small pivot; left alone x would grow to 1e15
    assert float(result.x.norm()) < 1e4 * float(b.norm())


def test_cg_on_an_inconsistent_system_does_not_blow_up() -> None:
    A, b = dense(SINGULAR["rank deficient"]), normal(N)
    result = cg(A, b, rtol=1e-8)
    assert result.status == ("stagnated",)
    assert float(result.residual_norms[0]) <= float(b.norm()) * (1 + N * EPS)


@SOLVERS
def test_max_steps_is_kept_and_reported(solve: Solver) -> None:
    A, b = dense(powers(-6)), normal(N, 2)
    result = solve(A, b, rtol=1e-10, max_steps=5)
    assert result.status == ("max steps", "max steps")
    assert result.steps == 5
    assert result.history.shape == (6, 2)
    torch.testing.assert_close(result.residual_norms, residuals(A, b, result.x))


@SOLVERS
def test_a_zero_right_hand_side_needs_no_product(solve: Solver) -> None:
    result = solve(dense(powers(-2)), torch.zeros(N, 2, dtype=F64))
    assert result.converged
    assert result.steps == 0
    assert not bool(result.x.any())


@SOLVERS
def test_a_start_at_the_solution_is_recognised(solve: Solver) -> None:
    A, x = dense(powers(-2)), normal(N, 2)
    kept = x.clone()
    result = solve(A, A @ x, x0=x, rtol=1e-8)
    assert result.steps == 0
    assert result.converged
    assert torch.equal(x, kept)
    assert result.x.data_ptr() != x.data_ptr()


@SYMMETRIC
def test_a_warm_start_saves_steps(solve: Solver) -> None:
    A, x = dense(powers(-3)), normal(N)
    b = A @ x
    cold = solve(A, b, rtol=1e-6)
    warm = solve(A, b, x0=x + 1e-4 * normal(N, seed=1), rtol=1e-6)
    assert warm.converged
    assert warm.steps < 0.8 * cold.steps


@SOLVERS
def test_the_callback_sees_every_step_and_may_stop(solve: Solver) -> None:
    A, b = dense(powers(-3)), normal(N)
    seen: list[Step] = []

    def stop_at_four(step: Step) -> bool:
        seen.append(step)
        return step.number == 4

    result = solve(A, b, callback=stop_at_four, rtol=1e-10)
    assert [step.number for step in seen] == [1, 2, 3, 4]
    assert seen[-1].x.shape == b.shape
    assert seen[-1].residual_norms.shape == (1,)
    assert result.status == ("interrupted",)
    torch.testing.assert_close(seen[-1].x, result.x)


@SOLVERS
def test_ctrl_c_returns_what_there_is(solve: Solver) -> None:
    A, b = dense(powers(-3)), normal(N)
    watched = Watched(A, fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        watched.operator @ solve(watched.operator, b, rtol=1e-10).x  # the check is interrupted too
    calls = 0

    def interrupt(step: Step) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt

    result = solve(A, b, rtol=1e-10, callback=interrupt)
    assert result.status == ("interrupted",)
    assert result.steps == 6
    torch.testing.assert_close(result.residual_norms[0], residuals(A, b, result.x))


@SOLVERS
def test_the_progress_bar_shows_steps_and_residual(
    solve: Solver, capsys: pytest.CaptureFixture[str]
) -> None:
    solve(dense(powers(-2)), normal(N), progress=True)
    shown = capsys.readouterr().err
    assert "residual" in shown
    assert "target" in shown
    solve(dense(powers(-2)), normal(N))
    assert capsys.readouterr().err == ""


@SOLVERS
def test_a_result_says_the_essentials_in_one_line(solve: Solver) -> None:
    result = solve(dense(powers(-2)), normal(N, 2))
    text = str(result)
    assert "converged" in text
    assert f"{result.products} products" in text
    assert len(text) < 120
    with pytest.raises(AttributeError):
        result.x = result.x  # type: ignore[misc]


@SYMMETRIC
def test_half_precision_is_solved_in_float32(solve: Solver) -> None:
    A = Dense(torch.diag(torch.linspace(1, 4, 16)).to(torch.bfloat16), symmetric=True)
    b = normal(16, dtype=torch.bfloat16)
    result = solve(A, b, rtol=1e-3)
    assert result.converged
    assert result.x.dtype is F32
    M, b = A.matrix.float(), b.float()
    assert bool((b - M @ result.x).norm() <= 1e-3 * b.norm() + rounding(M, result.x, b))


@SYMMETRIC
def test_a_live_operator_is_linearized_by_the_solver(solve: Solver) -> None:
    class Live(Dense):
        linearizations = 0

        def linearize(self, *, memory: int | str | None = None) -> LinearOperator:
            Live.linearizations += 1
            return Dense(self.matrix, symmetric=True)

    A = Live(matrix(powers(-1))[0], symmetric=True)
    assert solve(A, normal(N)).converged
    assert Live.linearizations == 1
