"""Vectors and matrices of any size: the squares of 1e-200 and 1e200 do not exist in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hvpop import Dense
from hvpop.solvers import (
    NotConverged,
    SolveResult,
    Step,
    cg,
    lsmr,
    matrix_function,
    minres,
    multishift_cg,
    steihaug,
)

from .problems import F32, F64, INDEFINITE, N, dense, normal, powers

SIZES = pytest.mark.parametrize(
    ("dtype", "size"), [(F64, 2.0**-660), (F64, 2.0**660), (F32, 2.0**-80), (F32, 2.0**80)]
)
SOLVERS = pytest.mark.parametrize("solve", [cg, minres, lsmr])


@SIZES
@SOLVERS
def test_the_answer_to_a_multiple_is_the_multiple_of_the_answer(
    solve: Callable[..., SolveResult], dtype: torch.dtype, size: float
) -> None:
    """A power of two changes no digit, so that nothing else may change."""
    A, B = dense(powers(-2), dtype=dtype), normal(N, 2, dtype=dtype)
    x0 = 0.1 * normal(N, 2, seed=1, dtype=dtype)
    one, other = solve(A, B, x0=x0, rtol=1e-4), solve(A, size * B, x0=size * x0, rtol=1e-4)
    assert one.status == other.status == ("converged", "converged")
    assert one.steps == other.steps
    assert torch.equal(one.x, other.x / size)
    for name in ("residual_norms", "targets", "history"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name) / size, equal_nan=True)


@SOLVERS
def test_columns_of_very_different_size_are_all_solved(
    solve: Callable[..., SolveResult],
) -> None:
    A, b = dense(powers(-2)), normal(N)
    sizes = torch.tensor([1e-250, 1.0, 1e250], dtype=F64)
    result = solve(A, b.unsqueeze(1) * sizes, rtol=1e-8)
    assert result.converged
    # the inverse has the norm 100; that of A'A, whose residual lsmr makes small, 10^4
    allowed = 2e-8 * float(b.norm()) * (1e4 if solve is lsmr else 100)
    torch.testing.assert_close(
        result.x / sizes, result.x[:, 1:2].expand(-1, 3), rtol=0, atol=allowed
    )


@SOLVERS
def test_the_callback_and_an_absolute_tolerance_are_in_units_of_the_problem(
    solve: Callable[..., SolveResult],
) -> None:
    A, b = dense(powers(-2)), 2.0**-660 * normal(N)
    seen: list[Step] = []
    result = solve(A, b, rtol=0.0, atol=1e-3 * 2.0**-660, callback=seen.append)
    assert result.converged
    torch.testing.assert_close(result.targets[0].item(), 1e-3 * 2.0**-660)
    torch.testing.assert_close(seen[0].residual_norms * 2.0**660, result.history[1] * 2.0**660)
    torch.testing.assert_close(seen[-1].x * 2.0**660, result.x * 2.0**660)


@SIZES
def test_many_dampings_of_any_size_of_right_hand_side(dtype: torch.dtype, size: float) -> None:
    A, b = dense(powers(-2), dtype=dtype), normal(N, dtype=dtype)
    one, other = (multishift_cg(A, s * b, [0.1, 1.0], rtol=1e-4) for s in (1.0, size))
    assert one.converged
    assert other.converged
    torch.testing.assert_close(one.x, other.x / size)


@SIZES
@pytest.mark.parametrize("name", ["sqrt", "sign", "abs", "exp"])
def test_functions_of_any_size_of_vector(name: str, dtype: torch.dtype, size: float) -> None:
    A, V = dense(INDEFINITE["indefinite"] + 1.02 * (name == "sqrt"), dtype=dtype), normal(N, 2)
    function = matrix_function(A, name, rtol=1e-3)  # type: ignore[arg-type]
    one, other = function.evaluate(V.to(dtype)), function.evaluate(size * V.to(dtype))
    assert one.converged
    assert other.converged
    torch.testing.assert_close(one.y, other.y / size)
    torch.testing.assert_close(one.errors, other.errors / size)


@pytest.mark.parametrize("size", [2.0**-660, 2.0**660])
def test_functions_of_any_size_of_matrix(size: float) -> None:
    M = dense(INDEFINITE["indefinite"]).matrix
    for name, factor in (("sign", 1.0), ("abs", size)):
        one, other = (
            matrix_function(Dense(s * M, symmetric=True), name, rtol=1e-4).evaluate(normal(N))  # type: ignore[arg-type]
            for s in (1.0, size)
        )
        assert one.converged
        assert other.converged
        assert one.steps == other.steps
        torch.testing.assert_close(one.y, other.y / factor)


@SIZES
@pytest.mark.parametrize("spectrum", [powers(-2), INDEFINITE["indefinite"]])
@pytest.mark.parametrize("radius", [0.1, 1e3])
def test_trust_region_steps_for_any_size_of_gradient(
    spectrum: torch.Tensor, radius: float, dtype: torch.dtype, size: float
) -> None:
    A, g = dense(spectrum, dtype=dtype), normal(N, dtype=dtype)
    one, other = (steihaug(A, s * g, s * radius) for s in (1.0, size))
    assert one.status == other.status
    assert one.products == other.products
    torch.testing.assert_close(one.step, other.step / size)
    assert other.norm / size == pytest.approx(one.norm)
    assert other.residual_norm / size == pytest.approx(one.residual_norm, rel=1e-4)
    if dtype is F32:  # the decrease has a square of the size, which Python has for float32
        assert other.decrease / size**2 == pytest.approx(one.decrease, rel=1e-5)


@pytest.mark.parametrize("radius", [1e-200, 1e200])
def test_a_region_of_any_size(radius: float) -> None:
    A, g = dense(INDEFINITE["indefinite"]), normal(N)
    result = steihaug(A, g, radius)
    assert result.on_boundary
    assert result.norm == pytest.approx(radius)
    assert result.decrease > 0


def test_functions_report_an_overflow_and_do_not_converge_on_it() -> None:
    """The largest float64 is 1.8e308: a multiple of it is no answer."""
    A = dense(powers(-1) * 2.0**1000)
    with pytest.raises(ValueError, match="f must be finite"):
        matrix_function(A, lambda t: t * t).evaluate(normal(N))
    with pytest.warns(NotConverged, match="max steps"):
        matrix_function(A, "sign", max_steps=1) @ normal(N)
