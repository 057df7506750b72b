"""The trust-region subproblem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvpop import Dense, Diagonal
from hvpop.solvers import nystrom, steihaug

from .problems import F64, INDEFINITE, N, dense, matrix, normal, powers


def model(M: Tensor, g: Tensor, s: Tensor) -> float:
    return float(g @ s + 0.5 * s @ M @ s)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("spectrum", [powers(-2), INDEFINITE["indefinite"]])
def test_the_step_stays_in_the_region_and_its_decrease_is_the_models(
    spectrum: Tensor, radius: float
) -> None:
    M, _ = matrix(spectrum)
    g = normal(N)
    result = steihaug(Dense(M, symmetric=True), g, radius, rtol=1e-6)
    assert float(result.step.norm()) <= radius * (1 + 1e-9)
    assert result.norm == pytest.approx(float(result.step.norm()), rel=1e-8)
    assert result.decrease == pytest.approx(-model(M, g, result.step), rel=1e-9)
    assert result.products == result.steps
    if result.on_boundary:
        assert float(result.step.norm()) == pytest.approx(radius, rel=1e-9)
    else:
        assert result.status == "converged"
        assert float((g + M @ result.step).norm()) <= 1e-6 * float(g.norm()) * 1.001


@pytest.mark.parametrize("radius", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("spectrum", [powers(-2), INDEFINITE["indefinite"]])
def test_the_step_is_no_worse_than_the_cauchy_point(spectrum: Tensor, radius: float) -> None:
    M, _ = matrix(spectrum)
    g = normal(N)
    curvature, length = float(g @ M @ g), float(g.norm())
    t = radius / length
    if curvature > 0:
        t = min(t, length**2 / curvature)
    result = steihaug(Dense(M, symmetric=True), g, radius)
    assert result.decrease >= -model(M, g, -t * g) * (1 - 1e-12)


def test_a_wide_region_gives_the_newton_step() -> None:
    M, _ = matrix(powers(-2))
    g = normal(N)
    result = steihaug(Dense(M, symmetric=True), g, 1e6, rtol=1e-10, max_steps=1000)
    assert result.status == "converged"
    torch.testing.assert_close(result.step, -torch.linalg.solve(M, g), rtol=1e-6, atol=1e-7)


def test_negative_curvature_is_followed_to_the_boundary_and_shown() -> None:
    A = Diagonal(torch.tensor([-2.0, 1.0], dtype=F64))
    result = steihaug(A, torch.tensor([1.0, 0.1], dtype=F64), 3.0)
    assert result.status == "negative curvature"
    assert result.on_boundary
    assert result.direction is not None
    assert float(result.direction @ (A @ result.direction)) < 0
    assert float(result.step.norm()) == pytest.approx(3.0)


def test_with_a_preconditioner_the_region_has_its_metric() -> None:
    M, _ = matrix(powers(-3))
    A, g = Dense(M, symmetric=True), normal(N)
    C = torch.diag(torch.linspace(1, 5, N, dtype=F64))  # the metric, inverse of the preconditioner
    result = steihaug(A, g, 0.7, preconditioner=Diagonal(1 / C.diagonal()), rtol=1e-6)
    assert result.status == "boundary"
    assert float(result.step @ C @ result.step) ** 0.5 == pytest.approx(0.7, rel=1e-9)
    assert result.decrease == pytest.approx(-model(M, g, result.step), rel=1e-9)


def test_a_good_preconditioner_saves_products() -> None:
    A, g = dense(powers(-3) + 1e-3), normal(N)
    plain = steihaug(A, g, 1e6, rtol=1e-6)
    fast = steihaug(A, g, 1e6, rtol=1e-6, preconditioner=nystrom(dense(powers(-3)), 60, 1e-3))
    assert plain.status == fast.status == "converged"
    assert fast.products < plain.products / 2


def test_no_gradient_no_step() -> None:
    result = steihaug(dense(powers(-1)), torch.zeros(N, dtype=F64), 1.0)
    assert result.status == "converged"
    assert result.products == 0
    assert result.decrease == 0


def test_limits_and_interruptions_are_reported() -> None:
    A, g = dense(powers(-4)), normal(N)
    assert steihaug(A, g, 1e9, rtol=1e-9, max_steps=3).status == "max steps"
    assert steihaug(A, g, 1e9, rtol=1e-9, callback=lambda step: True).status == "interrupted"

    def ctrl_c(step: object) -> None:
        raise KeyboardInterrupt

    result = steihaug(A, g, 1e9, rtol=1e-9, callback=ctrl_c)
    assert result.status == "interrupted"
    assert result.decrease > 0
    assert "interrupted" in str(result)
