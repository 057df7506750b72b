"""Problems whose answer is zero: exactly, or because their gradient is nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvpop import Dense, LinearOperator
from hvpop.solvers import SolveResult, cg, lsmr, minres

from .problems import F32, F64, SINGULAR, N, dense, matrix, normal, powers

Solver = Callable[..., SolveResult]
DAMPING = pytest.mark.parametrize("damping", [0.0, 1e-2])


def problem(
    shape: tuple[int, int], singular_values: Tensor, seed: int, dtype: torch.dtype = F64
) -> tuple[LinearOperator, Tensor]:
    """A matrix with these singular values, and a vector orthogonal to its range up to rounding."""
    m, n = shape
    rank = len(singular_values)
    U = torch.linalg.qr(normal(m, m, seed=seed)).Q
    W = torch.linalg.qr(normal(n, rank, seed=seed + 1)).Q
    b = U[:, rank:] @ normal(m - rank, seed=seed + 2)
    return Dense(((U[:, :rank] * singular_values) @ W.T).to(dtype)), b.to(dtype)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("shape", [(60, 20), (30, 60), (40, 40)])
@DAMPING
def test_least_squares_with_nothing_to_fit_have_converged_to_zero(
    shape: tuple[int, int], damping: float, dtype: torch.dtype
) -> None:
    spectra = [torch.ones(10, dtype=F64), powers(-3, 15), powers(-8, 20)]
    for seed, singular_values in enumerate(spectra):
        A, b = problem(shape, singular_values, 10 * seed, dtype)
        result = lsmr(A, b, damping=damping)
        assert result.status == ("converged",)
        assert result.steps <= 3
        assert not bool(result.x.any())
        torch.testing.assert_close(result.residual_norms[0], b.norm())
        # eight roundings of |A| |b|, with |A| = 1 from below
        assert float(result.targets) <= 8 * torch.finfo(dtype).eps * float(b.norm()) * 1.01
        assert bool((result.gradient_norms <= result.targets).all())


@DAMPING
def test_a_start_elsewhere_changes_nothing_of_that(damping: float) -> None:
    A, b = problem((60, 20), powers(-3, 15), 0)
    result = lsmr(A, b, damping=damping, x0=normal(20))
    assert result.converged
    assert not bool(result.x.any())


@DAMPING
def test_a_gradient_that_is_exactly_zero_needs_no_step(damping: float) -> None:
    A = Dense(torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=F64))
    b = torch.tensor([0.0, 3.0], dtype=F64)
    for x0 in (None, torch.ones(2, dtype=F64)):
        result = lsmr(A, b, damping=damping, x0=x0)
        assert result.status == ("converged",)
        assert result.steps == 0
        assert not bool(result.x.any())
        assert float(result.residual_norms) == 3.0


@DAMPING
def test_one_column_of_several_may_have_zero_for_its_answer(damping: float) -> None:
    A, b = problem((60, 20), powers(-2, 15), 0)
    others = normal(60, 2)
    B = torch.stack([others[:, 0], b, torch.zeros(60, dtype=F64), others[:, 1]], 1)
    result = lsmr(A, B, damping=damping, rtol=1e-10)
    assert result.converged
    assert not bool(result.x[:, 1:3].any())
    alone = lsmr(A, others, damping=damping, rtol=1e-10)
    torch.testing.assert_close(result.x[:, [0, 3]], alone.x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("part", [1e-6, 1e-9])
def test_a_small_gradient_is_no_rounding(part: float) -> None:
    """Little of ``b`` lies in the range, but more than rounding: that little is fitted."""
    A, b = problem((60, 20), torch.linspace(1, 2, 15, dtype=F64), 0)
    assert isinstance(A, Dense)
    x = torch.linalg.pinv(A.matrix, rtol=1e-10) @ normal(60)
    result = lsmr(A, b + part * (A.matrix @ x), rtol=1e-5)
    assert result.converged
    # the tolerance, and one rounding of b: |A'A| <= 4, its inverse <= 1
    allowed = part * 4e-5 * float(x.norm()) + 1e-15 * float(b.norm())
    torch.testing.assert_close(result.x, part * x, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("solve", [cg, minres, lsmr])
def test_zero_is_the_answer_to_zero_wherever_it_starts(solve: Solver, dtype: torch.dtype) -> None:
    for A in (dense(powers(-4), dtype=dtype), dense(SINGULAR["rank deficient"], dtype=dtype)):
        x0 = torch.stack([normal(N), 1e-30 * normal(N), 1e30 * normal(N)], 1).to(dtype)
        result = solve(A, torch.zeros(N, 3, dtype=dtype), x0=x0)
        assert set(result.status) == {"converged"}
        assert result.steps == 0
        assert not bool(result.x.any())


def test_a_null_vector_shows_no_negative_curvature() -> None:
    """Its curvature is rounding, and so is all that its product shows of the size of the matrix."""
    for dtype in (F64, F32):
        M, Q = matrix(SINGULAR["low rank"])
        A = Dense(M.to(dtype), symmetric=True)
        result = cg(A, Q[:, :110].to(dtype), rtol=1e-4)
        assert "negative curvature" not in result.status
        assert "converged" not in result.status


@pytest.mark.parametrize("solve", [cg, minres, lsmr])
def test_no_columns_are_no_problem(solve: Solver) -> None:
    result = solve(dense(powers(-2)), torch.zeros(N, 0, dtype=F64))
    assert result.x.shape == (N, 0)
    assert result.status == ()
    assert str(result).startswith("<no columns")
