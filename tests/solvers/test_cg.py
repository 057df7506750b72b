"""Conjugate gradients: curvature, preconditioners, and the number of products they need."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from hvpop import Dense, Diagonal, FromFunction
from hvpop.solvers import Inverse, cg, minres

from .problems import F32, F64, INDEFINITE, N, dense, matrix, normal, powers


def test_cg_ends_after_as_many_steps_as_there_are_distinct_eigenvalues() -> None:
    A = Diagonal(torch.tensor([1.0, 1.0, 3.0, 3.0, 7.0, 7.0, 7.0], dtype=F64))
    result = cg(A, normal(7, 4), rtol=1e-12)
    assert result.converged
    assert result.steps == 3


def test_cg_takes_the_steps_of_scipy_and_one_product_more() -> None:
    A, b = dense(powers(-3)), normal(N)
    steps = 0

    def count(_: np.ndarray) -> None:
        nonlocal steps
        steps += 1

    scipy.sparse.linalg.cg(A, b.numpy(), rtol=1e-8, callback=count)
    ours = cg(A, b, rtol=1e-8)
    assert (
        ours.steps <= 1.05 * steps + 1
    )  # the same but for rounding, of which either may have more
    assert ours.products <= ours.steps + 1  # one check


@pytest.mark.parametrize("spectrum", INDEFINITE)
def test_negative_curvature_comes_with_its_direction(spectrum: str) -> None:
    M, _ = matrix(INDEFINITE[spectrum])
    result = cg(Dense(M, symmetric=True), normal(N, 3), rtol=1e-10)
    assert set(result.status) == {"negative curvature"}
    assert result.directions is not None
    curvature = torch.linalg.vecdot(result.directions, M @ result.directions, dim=0)
    assert bool((curvature < 0).all())
    torch.testing.assert_close(result.directions.norm(dim=0), torch.ones(3, dtype=F64))
    assert result.steps < N


def test_only_the_column_that_meets_negative_curvature_stops() -> None:
    d = torch.cat([torch.tensor([-1.0]), torch.linspace(1, 2, 9)]).to(F64)
    b = torch.ones(10, 2, dtype=F64)
    b[0, 1] = 0.0  # the second column never sees the negative eigenvalue
    result = cg(Diagonal(d), b, rtol=1e-10)
    assert result.status == ("negative curvature", "converged")
    assert result.directions is not None
    assert not bool(result.directions[:, 1].any())
    torch.testing.assert_close(result.x[1:, 1], 1 / d[1:])


def test_no_curvature_is_claimed_from_rounding_alone() -> None:
    """The lowest eigenvalue is positive but below what float32 resolves."""
    A = dense(powers(-9), dtype=F32)
    result = cg(A, normal(N, 4, dtype=F32), rtol=1e-6, max_steps=300)
    assert "negative curvature" not in result.status


def test_the_exact_inverse_as_preconditioner_takes_one_step() -> None:
    M, _ = matrix(powers(-4))
    inverse = torch.linalg.inv(M)
    for solve in (cg, minres):
        result = solve(
            Dense(M, symmetric=True),
            normal(N, 2),
            preconditioner=Dense((inverse + inverse.T) / 2, symmetric=True),
            rtol=1e-8,
        )
        assert result.converged
        assert result.steps <= 2


def test_an_inverse_of_a_similar_operator_preconditions() -> None:
    M, _ = matrix(powers(-3))
    near = Dense(M + 1e-3 * torch.eye(N, dtype=F64), symmetric=True)
    A, b = Dense(M, symmetric=True), normal(N)
    plain = cg(A, b, rtol=1e-8)
    result = cg(A, b, rtol=1e-8, preconditioner=Inverse(near, lambda A, B: cg(A, B, rtol=1e-12).x))
    assert result.converged
    assert result.steps < plain.steps / 3


def test_minres_with_a_definite_preconditioner_solves_an_indefinite_system() -> None:
    d = torch.cat([-torch.logspace(-3, 0, 30), torch.logspace(-3, 0, 30)]).to(F64)
    A, b = Diagonal(d), normal(60, 2)
    plain = minres(A, b, rtol=1e-8)
    result = minres(A, b, rtol=1e-8, preconditioner=Diagonal(1 / d.abs()))
    assert plain.converged
    assert result.converged
    assert result.steps == 2  # the preconditioned eigenvalues are -1 and 1
    torch.testing.assert_close(result.x, b / d.unsqueeze(1))


def test_an_indefinite_preconditioner_is_refused() -> None:
    A, b = dense(powers(-1)), normal(N)
    for solve in (cg, minres):
        with pytest.raises(ValueError, match="not positive definite"):
            solve(A, b, preconditioner=Diagonal(-torch.ones(N, dtype=F64)))


def test_a_product_that_is_not_finite_is_an_error_that_says_when() -> None:
    calls = 0

    def poisoned(V: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return V / (torch.arange(1, 9, dtype=F64)[:, None] if calls < 3 else 0.0)

    with pytest.raises(FloatingPointError, match=r"cg\(<8x8 .*not finite after 3 steps"):
        cg(FromFunction(poisoned, (8, 8), symmetric=True), torch.ones(8, dtype=F64), rtol=1e-14)
