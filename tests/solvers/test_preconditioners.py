"""Preconditioners: positive definite always, exact where they can be, worth their products."""

from __future__ import annotations

import pytest
import torch

from hvpop import Damped, Dense, Diagonal
from hvpop.solvers import cg, jacobi, nystrom

from .problems import (
    F32,
    F64,
    INDEFINITE,
    N,
    Watched,
    dense,
    digits_hessian,
    matrix,
    normal,
    powers,
)


def test_jacobi_of_a_diagonal_operator_is_its_inverse() -> None:
    d = torch.logspace(-4, 4, 50, dtype=F64)
    torch.testing.assert_close(jacobi(Diagonal(d), samples=4).d, 1 / d)


def test_jacobi_is_positive_whatever_the_operator() -> None:
    for spectrum in (INDEFINITE["indefinite"], torch.zeros(N, dtype=F64), -powers(-2)):
        d = jacobi(dense(spectrum), samples=4).d
        assert bool((d > 0).all())
        assert bool(d.isfinite().all())


def test_jacobi_helps_where_rows_differ_in_size() -> None:
    scales = torch.logspace(-2, 2, N, dtype=F64)
    M = scales[:, None] * matrix(torch.linspace(1, 2, N, dtype=F64))[0] * scales
    A, b = Dense(M, symmetric=True), normal(N)
    M_inverse = jacobi(A, samples=64)
    plain = cg(A, b, rtol=1e-8, max_steps=20000)
    assert cg(A, b, rtol=1e-8, preconditioner=M_inverse).steps < plain.steps / 5


def test_jacobi_takes_its_samples_in_one_pass() -> None:
    watched = Watched(dense(powers(-1)))
    jacobi(watched.operator, samples=16)
    assert (watched.passes, watched.products) == (1, 16)


def test_nystrom_of_full_rank_is_the_inverse_up_to_a_factor() -> None:
    M, _ = matrix(powers(-2, 30))
    P = nystrom(Dense(M, symmetric=True), 30, 1e-2).to_dense()
    product = P @ (M + 1e-2 * torch.eye(30, dtype=F64))
    torch.testing.assert_close(product / product[0, 0], torch.eye(30, dtype=F64), rtol=0, atol=1e-6)


def test_nystrom_is_exact_on_a_matrix_of_its_rank() -> None:
    eigenvalues = torch.cat([torch.zeros(N - 5), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])]).to(F64)
    P = nystrom(dense(eigenvalues), 5, 1e-3)
    expected = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=F64)
    torch.testing.assert_close(P.eigenvalues, expected, rtol=1e-8, atol=0)


def test_nystrom_never_exceeds_the_matrix_and_keeps_what_is_large() -> None:
    eigenvalues = powers(-8).flip(0)
    P = nystrom(dense(eigenvalues), 40, 1e-4)
    assert bool((P.eigenvalues <= eigenvalues[:40] * (1 + 1e-8)).all())
    assert bool((P.eigenvalues[:20] >= 0.9 * eigenvalues[:20]).all())


@pytest.mark.parametrize("dtype", [F64, F32])
def test_nystrom_is_symmetric_positive_definite_and_applies_in_one_pass(dtype: torch.dtype) -> None:
    watched = Watched(dense(powers(-6), dtype=dtype))
    P = nystrom(watched.operator, 30, 1e-3)
    assert P.torch_dtype is dtype
    assert P.products == watched.products == 30
    assert watched.passes == 1
    full = P.to_dense()
    torch.testing.assert_close(full, full.T)
    assert float(torch.linalg.eigvalsh(full.double())[0]) > 0


def test_nystrom_bears_negative_eigenvalues_that_the_damping_outweighs() -> None:
    eigenvalues = powers(-6) - 5e-4
    A, b = Damped(dense(eigenvalues), 1e-3), normal(N)
    P = nystrom(dense(eigenvalues), 60, 1e-3)
    assert bool((P.eigenvalues >= 0).all())
    plain, fast = cg(A, b, rtol=1e-8), cg(A, b, rtol=1e-8, preconditioner=P)
    assert fast.converged
    assert fast.steps < plain.steps / 3


def test_nystrom_on_a_strongly_indefinite_matrix_still_is_definite() -> None:
    P = nystrom(dense(INDEFINITE["indefinite"]), 20, 1e-3).to_dense()
    assert float(torch.linalg.eigvalsh(P)[0]) > 0


def test_preconditioners_are_the_same_in_every_run() -> None:
    A = dense(powers(-2))
    torch.manual_seed(1)
    first = nystrom(A, 8, 0.1).to_dense(), jacobi(A).d
    state = torch.get_rng_state()
    second = nystrom(A, 8, 0.1).to_dense(), jacobi(A).d
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[1], jacobi(A, seed=1).d)


def test_nystrom_takes_at_most_a_third_of_the_products_on_the_digits_hessian() -> None:
    """Damping 1e-3, the same true residual; its own products are paid once for all systems."""
    H = digits_hessian()
    A, b = Damped(H, 1e-3), normal(H.shape[0])
    P = nystrom(H, 150, 1e-3)
    plain = cg(A, b, rtol=1e-8)
    fast = cg(A, b, rtol=1e-8, preconditioner=P)
    print(f"plain cg {plain.products} products, preconditioned {fast.products} after {P.products}")
    for result in (plain, fast):
        assert result.converged
        assert float((b - A @ result.x).norm() / b.norm()) <= 1.01e-8  # 1e-4 of it is rounding
    assert 3 * fast.products <= plain.products
