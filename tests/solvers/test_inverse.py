"""The inverse as an operator, direct solves and pseudoinverses."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from hvpop import Damped, Dense, Diagonal, HessianOperator, Identity
from hvpop.solvers import Direct, Inverse, NotConverged, cg, lsmr, minres, pseudoinverse

from .problems import F64, INDEFINITE, N, Watched, dense, matrix, normal, powers

SOLVES = {
    "cg": partial(cg, rtol=1e-12),
    "minres": partial(minres, rtol=1e-12),
    "lsmr": partial(lsmr, rtol=1e-12, max_steps=5000),
    "direct": Direct(),
}


@pytest.mark.parametrize("name", SOLVES)
def test_the_inverse_undoes_the_operator(name: str) -> None:
    A, V = dense(powers(-2)), normal(N, 3)
    inverse = Inverse(A, solve=SOLVES[name])
    torch.testing.assert_close(inverse @ (A @ V), V, rtol=1e-6, atol=1e-7)
    assert inverse.symmetric


def test_it_takes_arrays_and_composes() -> None:
    M, _ = matrix(powers(-1))
    H, v = Dense(M, symmetric=True), normal(N)
    influence = H @ Inverse(Damped(H, 0.5), solve=Direct()) @ H + 2 * Identity(N)
    expected = M @ torch.linalg.solve(M + 0.5 * torch.eye(N, dtype=F64), M @ v) + 2 * v
    result = influence @ v.numpy()
    assert isinstance(result, np.ndarray)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-10)


def test_a_square_operator_that_is_not_symmetric_has_an_inverse_and_its_transpose() -> None:
    M = normal(12, 12) + 6 * torch.eye(12, dtype=F64)
    v = normal(12, seed=1)
    for solve in (Direct(), partial(lsmr, rtol=1e-13)):
        inverse = Inverse(Dense(M), solve=solve)
        torch.testing.assert_close(inverse @ v, torch.linalg.solve(M, v))
        torch.testing.assert_close(inverse.T @ v, torch.linalg.solve(M.T, v))


def test_a_product_that_did_not_converge_warns() -> None:
    inverse = Inverse(dense(powers(-6)), solve=partial(cg, max_steps=3))
    with pytest.warns(NotConverged, match=r"Inverse.*max steps after 3 steps"):
        inverse @ normal(N)
    with pytest.warns(NotConverged, match="negative curvature"):
        Inverse(dense(INDEFINITE["indefinite"])) @ normal(N)


def test_logdet_comes_from_a_solver_that_knows_it() -> None:
    M, _ = matrix(powers(-2))
    A = Dense(M, symmetric=True)
    expected = -float(torch.logdet(M))
    assert Inverse(A, solve=Direct()).logdet() == pytest.approx(expected, rel=1e-10)
    with pytest.raises(
        TypeError, match=r"its solver cg does not give the determinant; use solve=Direct"
    ):
        Inverse(A).logdet()
    with pytest.raises(ValueError, match="negative; it has no logarithm"):
        Direct().logdet(Diagonal(torch.tensor([-1.0, 2.0, 3.0])))
    swapped = Dense(torch.tensor([[0.0, 1.0], [-2.0, 0.0]]))  # pivoting swaps rows, det is 2
    assert Direct().logdet(swapped) == pytest.approx(0.693147, abs=1e-5)


def test_a_direct_solver_factorizes_once() -> None:
    watched = Watched(dense(powers(-2)))
    inverse = Inverse(watched.operator, solve=Direct())
    inverse @ normal(N)
    inverse @ normal(N, 4)
    inverse.logdet()
    assert watched.products == N


def test_a_singular_matrix_is_refused_by_the_direct_solver() -> None:
    with pytest.raises(ValueError, match="is singular; damp it, or use lsmr"):
        Direct()(Diagonal(torch.tensor([1.0, 0.0])), torch.ones(2))
    with pytest.raises(ValueError, match="square operator"):
        Direct()(Dense(normal(3, 2)), normal(3))


def test_a_matrix_that_is_singular_up_to_rounding_warns() -> None:
    """No pivot of it is zero; the answer is as long as rounding allows."""
    A = dense(torch.cat([torch.zeros(40), torch.linspace(1, 5, 80)]).to(F64))
    with pytest.warns(NotConverged, match="singular up to rounding"):
        Direct()(A, normal(N))
    Direct()(dense(powers(-10)), normal(N))  # ill-conditioned, with digits left
    Direct()(Diagonal(torch.tensor([1e-20, 1.0], dtype=F64)), torch.tensor([0.0, 1.0], dtype=F64))


def test_the_inverse_follows_a_live_model_until_it_is_linearized() -> None:
    model = torch.nn.Linear(2, 1, bias=False).double()
    X, y = normal(8, 2), normal(8, 1, seed=1)

    def cubic(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets) ** 4).mean()

    H = HessianOperator(model, cubic, [(X, y)])
    v = normal(2, seed=2)
    for solve in (partial(cg, rtol=1e-12), Direct()):
        inverse = Inverse(H, solve=solve)
        frozen = inverse.linearize()
        assert frozen.is_current()
        before = inverse @ v
        torch.testing.assert_close(before, torch.linalg.solve(H.to_dense(), v))
        with torch.no_grad():
            model.weight += 1.0
        torch.testing.assert_close(inverse @ v, torch.linalg.solve(H.to_dense(), v))
        assert not frozen.is_current()


@pytest.mark.parametrize("spectrum", ["indefinite", "indefinite, rank deficient"])
def test_the_pseudoinverse_of_a_spectrum_is_the_matrixs(spectrum: str) -> None:
    M, Q = matrix(INDEFINITE[spectrum])
    inverse = pseudoinverse(INDEFINITE[spectrum], Q).to_dense()
    torch.testing.assert_close(inverse, torch.linalg.pinv(M, rtol=1e-10, hermitian=True))


def test_small_eigenvalues_are_left_out_of_the_pseudoinverse() -> None:
    U = torch.eye(3, dtype=F64)
    A = pseudoinverse(torch.tensor([1.0, -0.1, 0.01], dtype=F64), U, rtol=0.05)
    torch.testing.assert_close(A.to_dense().diagonal(), torch.tensor([1.0, -10.0, 0.0], dtype=F64))
