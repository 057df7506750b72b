"""Misuse is an exception that says who, what was expected, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hvpop import Dense, Diagonal, Identity
from hvpop.solvers import (
    Inverse,
    block_cg,
    cg,
    jacobi,
    lsmr,
    matrix_function,
    minres,
    multishift_cg,
    nystrom,
    pseudoinverse,
    steihaug,
)

from .problems import F64, normal

A = Diagonal(torch.linspace(1, 2, 6, dtype=F64))
b = torch.ones(6, dtype=F64)

SOLVERS: dict[str, Callable[..., Any]] = {
    "cg": cg,
    "block_cg": block_cg,
    "minres": minres,
    "lsmr": lsmr,
    "multishift_cg": lambda A, b, **options: multishift_cg(A, b, [0.0], **options),
    "steihaug": lambda A, b, **options: steihaug(A, b, 1.0, **options),
    "matrix_function": lambda A, b, **options: matrix_function(A, "exp", **options).evaluate(b),
}
EVERY = pytest.mark.parametrize("name", SOLVERS)


@EVERY
def test_a_right_hand_side_of_another_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expects .* of shape \(6,\)( or \(6, k\))?, got \(5,\)"):
        SOLVERS[name](A, torch.ones(5, dtype=F64))


@EVERY
def test_an_array_is_refused_with_what_takes_arrays(name: str) -> None:
    with pytest.raises(TypeError, match=r"torch tensor, got ndarray; use torch\.as_tensor"):
        SOLVERS[name](A, np.ones(6))


@EVERY
def test_another_dtype_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"of dtype torch\.float64, got torch\.float32"):
        SOLVERS[name](A, torch.ones(6))


@EVERY
def test_entries_that_are_not_finite_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        SOLVERS[name](A, torch.full((6,), torch.nan, dtype=F64))


@EVERY
def test_what_is_no_operator_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"expects an hvpop\.LinearOperator, got ndarray; wrap"):
        SOLVERS[name](np.eye(6), b)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "lsmr"])
def test_an_operator_that_is_not_symmetric_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"expects a symmetric operator, got <6x6 Dense .*symmetric=True"
    ):
        SOLVERS[name](Dense(normal(6, 6)), b)


@EVERY
def test_tolerances_and_limits_that_are_none_are_refused(name: str) -> None:
    solve = SOLVERS[name]
    with pytest.raises(ValueError, match=f"{name} expects a finite rtol >= 0, got rtol=-1.0"):
        solve(A, b, rtol=-1.0)
    with pytest.raises(ValueError, match="finite atol >= 0, got atol=nan"):
        solve(A, b, atol=float("nan"))
    with pytest.raises(TypeError, match="rtol as a number, got rtol='x'"):
        solve(A, b, rtol="x")
    with pytest.raises(TypeError, match=r"max_steps as an integer, got max_steps=2\.5"):
        solve(A, b, max_steps=2.5)


@pytest.mark.parametrize("name", ["cg", "minres", "lsmr", "multishift_cg", "block_cg"])
def test_a_callback_that_cannot_be_called_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} expects callback as a function of a Step, got 3"):
        SOLVERS[name](A, b, callback=3)


@pytest.mark.parametrize("name", ["cg", "minres", "steihaug"])
def test_a_preconditioner_that_does_not_fit_is_refused(name: str) -> None:
    solve = SOLVERS[name]
    with pytest.raises(ValueError, match=r"preconditioner of shape \(6, 6\), got <5x5 Identity"):
        solve(A, b, preconditioner=Identity(5))
    with pytest.raises(ValueError, match="preconditioner expects a symmetric operator"):
        solve(A, b, preconditioner=Dense(normal(6, 6)))
    with pytest.raises(TypeError, match=r"preconditioner of dtype torch\.float64"):
        solve(A, b, preconditioner=Identity(6, dtype=torch.float32))
    with pytest.raises(
        TypeError, match=r"preconditioner expects an hvpop\.LinearOperator, got Tensor; wrap"
    ):
        solve(A, b, preconditioner=torch.eye(6, dtype=F64))


def test_a_start_that_does_not_fit_the_right_hand_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="one x0 per column of b"):
        cg(A, torch.ones(6, 2, dtype=F64), x0=b)
    with pytest.raises(ValueError, match=r"expects x0 of shape \(4,\)"):
        lsmr(Dense(normal(6, 4)), b, x0=b)


def test_a_least_squares_problem_needs_a_right_hand_side_of_m_entries() -> None:
    with pytest.raises(ValueError, match=r"expects b of shape \(6,\)"):
        lsmr(Dense(normal(6, 4)), torch.ones(4, dtype=F64))
    with pytest.raises(ValueError, match="damping >= 0"):
        lsmr(Dense(normal(6, 4)), b, damping=-1.0)


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="rank between 1 and 6, got 7"):
        nystrom(A, 7, 1.0)
    with pytest.raises(ValueError, match="damping > 0, got damping=0"):
        nystrom(A, 2, 0.0)
    with pytest.raises(ValueError, match="samples >= 2, got samples=1"):
        jacobi(A, samples=1)
    with pytest.raises(ValueError, match="radius > 0, got radius=0"):
        steihaug(A, b, 0.0)
    with pytest.raises(ValueError, match=r"one gradient of shape \(6,\), got \(6, 2\)"):
        steihaug(A, torch.ones(6, 2, dtype=F64), 1.0)
    with pytest.raises(ValueError, match="shifts as a list of finite numbers"):
        multishift_cg(A, b, [])
    with pytest.raises(ValueError, match="shifts as a list of finite numbers, got abc"):
        multishift_cg(A, b, "abc")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rank as an integer, got rank=2\.5"):
        nystrom(A, 2.5, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="f as a name or a function of eigenvalues, got 3"):
        matrix_function(A, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"f must be elementwise: of eigenvalues \(1, 4\) it gave"):
        matrix_function(A, lambda t: t.sum()).evaluate(b)
    with pytest.raises(ValueError, match=r"knows sqrt, .* got 'cosine'"):
        matrix_function(A, "cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eigenvalues \(k,\) and eigenvectors \(n, k\)"):
        pseudoinverse(torch.ones(3, dtype=F64), torch.eye(4, dtype=F64))
    with pytest.raises(ValueError, match="expects a square"):
        Inverse(Dense(normal(3, 4)))
    with pytest.raises(TypeError, match=r"Inverse expects an hvpop\.LinearOperator, got Tensor"):
        Inverse(normal(3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"solve as a function of an operator and columns.*'cg'"):
        Inverse(A, solve="cg")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"solver to return a SolveResult .*, got NoneType"):
        Inverse(A, solve=lambda A, V: None) @ b  # type: ignore[arg-type, return-value]
