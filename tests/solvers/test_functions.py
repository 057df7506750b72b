"""Functions of operators: against the eigendecomposition, with errors that are what they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hvpop import Dense, Diagonal
from hvpop.solvers import NotConverged, matrix_function

from .problems import F32, F64, INDEFINITE, N, Watched, dense, matrix, normal, powers

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": torch.sqrt,
    "invsqrt": torch.rsqrt,
    "log": torch.log,
    "exp": torch.exp,
    "abs": torch.abs,
    "sign": torch.sign,
}


def exact(eigenvalues: Tensor, f: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
    _, Q = matrix(eigenvalues)
    return Q @ (f(eigenvalues).unsqueeze(1) * (Q.T @ V))


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_a_definite_matrix_meets_its_tolerance(name: str, rtol: float) -> None:
    V = normal(N, 3)
    result = matrix_function(dense(powers(-3)), name, rtol=rtol).evaluate(V)  # type: ignore[arg-type]
    error = (result.y - exact(powers(-3), FUNCTIONS[name], V)).norm(dim=0)
    assert result.converged
    assert bool((error <= result.errors).all())
    assert bool((result.errors <= rtol * result.y.norm(dim=0) * 1.001).all())


@pytest.mark.parametrize("name", ["exp", "abs", "sign"])
def test_a_function_of_an_indefinite_matrix_meets_its_tolerance(name: str) -> None:
    V, spectrum = normal(N, 2), INDEFINITE["indefinite"]
    result = matrix_function(dense(spectrum), name).evaluate(V)  # type: ignore[arg-type]
    error = (result.y - exact(spectrum, FUNCTIONS[name], V)).norm(dim=0)
    assert result.converged
    assert bool((error <= result.errors).all())


@pytest.mark.parametrize("name", ["sqrt", "invsqrt", "log"])
def test_the_error_estimate_covers_the_error_while_it_converges(name: str) -> None:
    """Wherever it stops: of 40 vectors and four stops, at most one estimate in 20 is too low."""
    A, V = dense(powers(-3)), normal(N, 40)
    low = 0
    for steps in (16, 24, 40, 64):
        result = matrix_function(A, name, rtol=0.0, max_steps=steps).evaluate(V)  # type: ignore[arg-type]
        error = (result.y - exact(powers(-3), FUNCTIONS[name], V)).norm(dim=0)
        low += int((error > result.errors).sum())
    assert low <= 160 / 20


def test_a_callable_on_eigenvalues_is_any_function() -> None:
    d = torch.linspace(1, 3, 10, dtype=F64)
    v = normal(10)
    result = matrix_function(Diagonal(d), lambda t: 1 / (t + 2), rtol=1e-12) @ v
    torch.testing.assert_close(result, v / (d + 2))


def test_it_composes_like_any_operator() -> None:
    A = dense(powers(-2))
    root = matrix_function(A, "sqrt", rtol=1e-10)
    v = normal(N)
    torch.testing.assert_close(root @ (root @ v), A @ v, rtol=1e-7, atol=1e-8)
    both = (2 * root + A).linearize()
    torch.testing.assert_close(both @ v, 2 * (root @ v) + A @ v)
    assert isinstance(root @ v.numpy(), np.ndarray)
    assert root.symmetric


def test_the_root_of_a_singular_matrix_clips_what_rounding_made_negative() -> None:
    spectrum = torch.cat([torch.zeros(60), torch.linspace(1, 2, 60)]).to(F64)
    V = normal(N, 2)
    result = matrix_function(dense(spectrum), "sqrt").evaluate(V)
    assert result.converged
    torch.testing.assert_close(
        result.y, exact(spectrum, torch.sqrt, V), rtol=0, atol=1e-6 * float(V.norm())
    )


@pytest.mark.parametrize("name", ["sqrt", "invsqrt", "log"])
def test_a_function_outside_its_domain_is_an_error_that_shows_the_spectrum(name: str) -> None:
    root = matrix_function(dense(INDEFINITE["indefinite"]), name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must .*be .*; its Ritz values lie in \[-"):
        root @ normal(N)


def test_columns_share_passes_and_leave_when_they_are_done() -> None:
    M, Q = matrix(powers(-3))
    watched = Watched(Dense(M, symmetric=True))
    V = torch.stack([Q[:, -1], normal(N), torch.zeros(N, dtype=F64)], 1)
    result = matrix_function(watched.operator, "exp").evaluate(V)
    assert result.converged
    assert watched.widths[0] == 2  # nothing to do for zero
    assert set(watched.widths[1:]) == {1}
    assert result.products == watched.products
    assert watched.passes == result.steps
    assert not bool(result.y[:, 2].any())
    torch.testing.assert_close(result.y[:, 0], Q[:, -1] * torch.e)


def test_an_unmet_tolerance_is_a_status_and_a_warning() -> None:
    root = matrix_function(dense(powers(-4)), "invsqrt", max_steps=10)
    result = root.evaluate(normal(N))
    assert result.status == ("max steps",)
    assert result.steps == 10
    with pytest.warns(NotConverged, match="MatrixFunction.*max steps"):
        root @ normal(N)


def test_the_floor_of_the_dtype_is_recognised() -> None:
    result = matrix_function(dense(torch.linspace(1, 2, N), dtype=F32), "exp", rtol=1e-12).evaluate(
        normal(N, dtype=F32)
    )
    assert result.status == ("stagnated",)
    assert result.steps < 40


def test_a_product_that_is_not_finite_is_an_error() -> None:
    A = Diagonal(torch.tensor([1.0, torch.inf]))
    with pytest.raises(FloatingPointError, match="product 1 is not finite"):
        matrix_function(A, "exp") @ torch.ones(2)
