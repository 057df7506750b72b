"""Vectors and matrices of any size: the squares of 1e-200 and 1e200 do not exist in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hvpop import Dense
from hvpop.solvers import (
    Direct,
    Inverse,
    NotConverged,
    SolveResult,
    Step,
    block_cg,
    cg,
    jacobi,
    lsmr,
    matrix_function,
    minres,
    multishift_cg,
    nystrom,
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


def _positive(scale: float, dtype: torch.dtype) -> Dense:
    return Dense((scale * dense(powers(-1.5, 30)).matrix).to(dtype), symmetric=True)


MULTIPLES: dict[str, Callable[[Dense, torch.Tensor, float], torch.Tensor]] = {
    "cg": lambda A, b, s: cg(A, b).x,
    "cg, started": lambda A, b, s: cg(A, b, x0=0.1 * b / s).x,
    "cg, nystrom": lambda A, b, s: cg(A, b, preconditioner=nystrom(A, 8, 0.03 * s)).x,
    "cg, jacobi": lambda A, b, s: cg(A, b, preconditioner=jacobi(A)).x,
    "minres": lambda A, b, s: minres(A, b).x,
    "minres, started": lambda A, b, s: minres(A, b, x0=0.1 * b / s).x,
    "minres, jacobi": lambda A, b, s: minres(A, b, preconditioner=jacobi(A)).x,
    "block_cg": lambda A, b, s: block_cg(A, b).x,
    "lsmr": lambda A, b, s: lsmr(A, b).x,
    "multishift_cg": lambda A, b, s: multishift_cg(A, b, [0.1 * s, s]).x[0],
    "steihaug, inside": lambda A, b, s: steihaug(A, b, 1e4 / s, rtol=1e-4).step,
    "steihaug, boundary": lambda A, b, s: steihaug(A, b, 1e-1 / s).step,
    "inverse": lambda A, b, s: Inverse(A) @ b,
    "direct": lambda A, b, s: Inverse(A, solve=Direct()) @ b,
    "invsqrt": lambda A, b, s: matrix_function(A, "invsqrt", rtol=1e-4) @ b,
    "sqrt": lambda A, b, s: matrix_function(A, "sqrt", rtol=1e-4) @ b,
    "sign": lambda A, b, s: matrix_function(A, "sign", rtol=1e-4) @ b,
    "jacobi": lambda A, b, s: jacobi(A).d,
    "nystrom": lambda A, b, s: nystrom(A, 8, 0.03 * s).eigenvalues,
}
POWERS = {"invsqrt": -0.5, "sqrt": 0.5, "sign": 0.0, "nystrom": 1.0}  # of the scale; else -1


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *[(F32, s) for s in (1e-30, 1e-22, 1e-12, 1e12, 1e19, 1e30)],
        (F64, 2.0**-660),
        (F64, 2.0**660),
    ],
)
@pytest.mark.parametrize("name", MULTIPLES)
def test_the_answer_for_a_multiple_of_the_operator(
    name: str, dtype: torch.dtype, scale: float
) -> None:
    b = normal(30).to(dtype)
    one = MULTIPLES[name](_positive(1.0, dtype), b, 1.0).double()
    other = MULTIPLES[name](_positive(scale, dtype), b, scale).double()
    other = other / scale ** POWERS.get(name, -1.0)
    # rtol 1e-5 of the residual and a condition of 10^1.5, squared in lsmr
    allowed = 2e-5 * 10 ** (3 if name == "lsmr" else 1.5) * float(one.norm())
    torch.testing.assert_close(other, one, rtol=0, atol=allowed)


@pytest.mark.parametrize("scale", [1e-19, 1e19])
def test_least_squares_and_its_damping_at_any_scale(scale: float) -> None:
    M, b = normal(40, 20), normal(40)
    for damping in (0.0, 0.5):
        A = Dense((scale * M).float())
        found = lsmr(A, (scale * b).float(), damping=damping * scale**2, rtol=1e-4)
        exact = torch.linalg.solve(M.T @ M + damping * torch.eye(20, dtype=F64), M.T @ b)
        assert found.converged
        torch.testing.assert_close(found.x.double(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("solve", [cg, block_cg, minres, lsmr])
def test_no_tolerance_ends_where_rounding_does(solve: Callable[..., SolveResult]) -> None:
    """Condition 2: each step takes at least a factor of 5 off, so that 25 leave less than rounding."""
    A, b = Dense(torch.diag(torch.linspace(1, 2, 100, dtype=F64)), symmetric=True), normal(100)
    for B in (b, normal(100, 3)):
        result = solve(A, B, rtol=0.0)
        assert set(result.status) == {"stagnated"}
        assert result.steps <= 50
        assert float(result.residual_norms.max()) <= 1e-13 * float(B.norm())


def test_a_function_that_overflows_is_no_answer() -> None:
    A = _positive(1e30, F32)
    with pytest.raises(FloatingPointError, match=r"larger than torch\.float32 holds"):
        matrix_function(A, "abs", rtol=1e-3) @ (1e30 * normal(30)).float()
