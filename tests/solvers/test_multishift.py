"""Many dampings from one Krylov space."""

from __future__ import annotations

import pytest
import torch

from hvpop import Damped, Dense
from hvpop.solvers import cg, multishift_cg

from .problems import F32, F64, INDEFINITE, N, Watched, dense, matrix, normal, powers, rounding

SHIFTS = [1e-1, 1e-3, 1.0, 1e-2]


@pytest.mark.parametrize("spectrum", [powers(-2), powers(-8), torch.zeros(N, dtype=F64)])
def test_every_shift_is_solved_to_its_true_residual(spectrum: torch.Tensor) -> None:
    M, _ = matrix(spectrum)
    b = normal(N, 2)
    result = multishift_cg(Dense(M, symmetric=True), b, SHIFTS, rtol=1e-9)
    assert result.converged
    assert result.x.shape == (4, N, 2)
    for i, shift in enumerate(SHIFTS):
        shifted = M + shift * torch.eye(N, dtype=F64)
        norms = (b - shifted @ result.x[i]).norm(dim=0)
        unsure = rounding(shifted, result.x[i], b)
        assert bool((norms <= 1e-9 * b.norm(dim=0) + unsure).all())
        assert bool(((result.residual_norms[i] - norms).abs() <= unsure).all())


def test_a_vector_gives_one_solution_per_shift() -> None:
    result = multishift_cg(dense(powers(-1)), normal(N), torch.tensor(SHIFTS, dtype=F64))
    assert result.x.shape == (4, N)
    assert len(result.status) == 4


def test_all_shifts_cost_what_the_hardest_one_costs() -> None:
    A, b = dense(powers(-6)), normal(N)
    watched = Watched(A)
    family = multishift_cg(watched.operator, b, SHIFTS, rtol=1e-8)
    hardest = cg(Damped(A, min(SHIFTS)), b, rtol=1e-8)
    assert family.products == watched.products
    # after many steps rounding decides on a few of them; each shift is checked once
    assert family.products <= 1.1 * hardest.products + len(SHIFTS)
    assert watched.passes == family.steps + 1  # one block checks all


def test_negative_curvature_stops_only_the_shifts_that_have_it() -> None:
    A = dense(INDEFINITE["indefinite"])  # eigenvalues from -1 to 1
    result = multishift_cg(A, normal(N, 2), [0.5, 1.5], rtol=1e-8)
    assert result.status == (("negative curvature",) * 2, ("converged",) * 2)


def test_what_rounding_spoils_is_finished_by_cg() -> None:
    A = dense(powers(-6), dtype=F32)
    b = normal(N, 2, dtype=F32)
    rtol = 3e-5  # ten times what float32 can do
    result = multishift_cg(A, b, [1e-2, 1e-1], rtol=rtol)
    assert result.converged
    for i, shift in enumerate([1e-2, 1e-1]):
        shifted = A.matrix + shift * torch.eye(N)
        norms, unsure = (b - shifted @ result.x[i]).norm(dim=0), rounding(shifted, result.x[i], b)
        assert bool((norms <= rtol * b.norm(dim=0) + unsure).all())


def test_the_dtypes_floor_is_recognised() -> None:
    A = dense(powers(-6), dtype=F32)
    result = multishift_cg(A, normal(N, dtype=F32), [1e-2], rtol=1e-11)
    assert result.status == (("stagnated",),)


def test_a_tolerance_of_zero_ends_at_the_dtypes_floor_too() -> None:
    result = multishift_cg(dense(powers(-2)), normal(N), [0.1, 1.0], rtol=0.0)
    assert result.status == (("stagnated",),) * 2
    assert result.steps < 3 * N
    assert bool((result.residual_norms <= 1e-12).all())


def test_limits_and_interruptions_are_reported() -> None:
    A, b = dense(powers(-6)), normal(N)
    assert multishift_cg(A, b, [1e-6], max_steps=3).status == (("max steps",),)
    stopped = multishift_cg(A, b, [1e-6, 1.0], callback=lambda step: step.number == 3)
    assert stopped.steps == 3
    assert stopped.status[0] == ("interrupted",)

    def ctrl_c(step: object) -> None:
        raise KeyboardInterrupt

    assert multishift_cg(A, b, [1e-6], callback=ctrl_c).status == (("interrupted",),)


def test_a_zero_right_hand_side_is_solved_by_zero() -> None:
    result = multishift_cg(dense(powers(-1)), torch.zeros(N, 2, dtype=F64), [0.1])
    assert result.converged
    assert not bool(result.x.any())
