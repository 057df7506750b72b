"""A diagonal plus a low rank is solved directly; where that is not accurate the other solver is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from hvpop import Damped, Dense, Diagonal, Identity, LinearOperator, LowRank
from hvpop.operators.splitting import split
from hvpop.solvers import (
    Direct,
    Inverse,
    NotConverged,
    SolveResult,
    Woodbury,
    cg,
    lsmr,
    minres,
    nystrom,
)

from .problems import EPS, F32, F64, N, normal, rounding

R = 7


def never(A: LinearOperator, b: Tensor) -> Tensor:
    raise AssertionError(f"{A!r} was to be solved directly")


def factor(seed: int = 0) -> Tensor:
    return normal(N, R, seed=seed)


def weights() -> Tensor:
    return torch.tensor([3.0, 1.0, 0.0, 0.5, 2.0, 1e-3, 1.0], dtype=F64)


class Twice(LowRank):
    """Of a user's: what it is made of does not tell what it does."""

    def _apply(self, V: Tensor) -> Tensor:
        return 2 * super()._apply(V)


d = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=F64)
LOW = LowRank(factor(), weights())
DEPENDENT = LowRank(torch.cat([factor(), factor()], 1))  # rank 7 of 14 columns
INDEFINITE = LowRank(factor(), weights() - 1.0)

CASES: dict[str, Callable[[], LinearOperator]] = {
    "damped": lambda: Damped(LOW, 0.1),
    "damped by entry": lambda: Damped(LOW, d),
    "identity and low rank": lambda: 0.3 * Identity(N) + LOW,
    "diagonal and two low ranks": lambda: Diagonal(d) + LOW - 0.1 * LowRank(factor(1)),
    "scaled and damped twice": lambda: Damped(2 * Damped(LOW, 0.1), d),
    "dependent columns": lambda: Damped(DEPENDENT, 0.01),
    "indefinite": lambda: Damped(INDEFINITE, 0.05),
    "negative diagonal": lambda: LOW - Diagonal(d),
    "not symmetric": lambda: Identity(N) + LowRank(factor(), weights(), factor(1)),
    "diagonal alone": lambda: 3 * Diagonal(d),
    "product": lambda: Damped(LOW, 1.0) @ Diagonal(d) @ Damped(INDEFINITE, 0.05),
    "mirrored": lambda: -2.0 * (Diagonal(d) @ Damped(LOW, 1.0) @ Diagonal(d)),
    "power": lambda: Damped(LOW, 1.0) ** 2,
    "preconditioner": lambda: nystrom(LOW, R, 0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_inverse_is_direct_and_accurate(name: str) -> None:
    A, B = CASES[name](), normal(N, 3)
    M, inverse = A.to_dense(), Inverse(A, solve=Woodbury(never))
    for matrix, X in ((M, inverse @ B), (M.T, inverse.T @ B)):
        residual = (matrix @ X - B).norm(dim=0)
        assert bool((residual <= N * rounding(matrix, X, B)).all())
        truth = torch.linalg.solve(matrix, B)
        error = (X - truth).norm(dim=0) / truth.norm(dim=0)
        assert bool((error <= N * EPS * torch.linalg.cond(matrix)).all())


@pytest.mark.parametrize("name", CASES)
def test_the_determinant_is_known(name: str) -> None:
    A = CASES[name]()
    M = A.to_dense()
    sign, size = torch.linalg.slogdet(M)
    if sign > 0:
        found = Inverse(A).logdet()
        assert abs(found + float(size)) <= N * EPS * float(torch.linalg.cond(M))
    else:
        with pytest.raises(ValueError, match=r"the determinant of .* is negative"):
            Inverse(A).logdet()


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("product", "mirrored", "power")]
)
def test_what_is_split_adds_up_to_the_matrix(name: str) -> None:
    A = CASES[name]()
    M, parts = A.to_dense(), split(A)
    assert parts is not None
    made = torch.diag(parts.d) + (parts.U * parts.s) @ parts.W.T
    torch.testing.assert_close(made, M)
    assert parts.size() >= float(torch.linalg.matrix_norm(M, 2)) * (1 - 1e-12)


def test_what_is_made_otherwise_goes_to_the_other_solver() -> None:
    class Rule(Damped):
        def damping(self, V: Tensor) -> Tensor:
            return 2 * V

    asked = []

    def other(A: LinearOperator, b: Tensor) -> Tensor:
        asked.append(A)
        return b

    for A in (
        Dense(torch.eye(N, dtype=F64), symmetric=True),
        Damped(Twice(factor()), 1.0),
        Rule(LOW),
        LOW,  # singular
        Diagonal(d) + Damped(LowRank(normal(N, N)), 1.0),  # of full rank
        LOW - Diagonal(torch.zeros(N, dtype=F64)),
    ):
        Woodbury(other)(A, normal(N))
        assert asked.pop() is A


def test_ill_conditioned_ones_keep_their_digits() -> None:
    """Refinement keeps the residual at rounding where the formula alone loses eps times the condition."""
    for damping in (1e-2, 1e-5, 1e-8):
        A = Damped(LOW, damping)
        B = torch.cat(
            [normal(N, 2), factor()[:, :1]], 1
        )  # one in the span, where the answer is small
        X = Inverse(A, solve=Woodbury(never)) @ B
        residual = (A.to_dense() @ X - B).norm(dim=0)
        assert bool((residual <= 4 * rounding(A.to_dense(), X, B)).all())


def low_rank_plus(U: Tensor, damping: float) -> Tensor:
    """The matrix that float32 parts stand for, in float64."""
    U = U.double()
    return U @ U.T + torch.tensor(damping, dtype=F32).double() * torch.eye(N, dtype=F64)


def test_float32_is_accurate_to_its_rounding() -> None:
    U, B = factor().float(), normal(N, 2, dtype=F32)
    M = low_rank_plus(U, 0.01)
    X = Inverse(Damped(LowRank(U), 0.01), solve=Woodbury(never, rtol=1e-2)) @ B
    assert bool(((M @ X.double() - B).norm(dim=0) <= 4 * rounding(M.float(), X, B)).all())


def test_where_rounding_allows_no_better_the_answer_is_stagnated_and_kept() -> None:
    """Its error is small all the same: a residual where the matrix is large is little of the answer."""
    U, b = factor().float(), normal(N, dtype=F32)
    A = Damped(LowRank(U), 1e-4)
    with pytest.warns(NotConverged, match=r"stagnated.*take float64"):
        x = Inverse(A, solve=Woodbury(never)) @ b
    truth = torch.linalg.solve(low_rank_plus(U, 1e-4), b.double())
    assert float((x - truth).norm() / truth.norm()) < 1e-5
    other = cg(A, b)
    assert float((other.x - truth).norm()) > float((x - truth).norm())


def test_a_singular_one_is_left_to_the_other_solver() -> None:
    u = torch.ones(4, 1, dtype=F64) / 2
    A = Identity(4) - LowRank(u)  # 1 is its null vector
    b = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=F64)
    result = Woodbury(partial(minres, rtol=1e-12))(A, b)
    assert isinstance(result, SolveResult)
    assert result.converged
    torch.testing.assert_close(A @ result.x, b)
    with pytest.warns(NotConverged):
        Inverse(A) @ torch.ones(4, dtype=F64)
    with pytest.raises(ValueError, match="zero; it has no logarithm"):
        Inverse(A).logdet()


def test_factors_are_made_once_and_again_when_shared_entries_change() -> None:
    U = factor()
    A, b = Damped(LowRank(U), 0.1), normal(N)
    solve = Woodbury(never)
    inverse = Inverse(A, solve=solve)
    inverse @ b
    kept = solve._factors[0]
    inverse @ normal(N, 2)
    assert solve._factors[0] is kept
    U.mul_(1.5)
    torch.testing.assert_close(A @ (inverse @ b), b)
    assert solve._factors[0] is not kept


def test_other_solvers_are_asked_for_what_they_know() -> None:
    M = torch.diag(d) + 0.1
    A = Dense(M, symmetric=True)
    assert Woodbury(Direct()).logdet(A) == pytest.approx(float(torch.logdet(M)), rel=1e-12)
    with pytest.raises(
        TypeError, match="no diagonal plus low rank, and its solver lsmr does not give"
    ):
        Inverse(A, solve=Woodbury(lsmr)).logdet()
    with pytest.raises(TypeError, match="another solver, such as cg"):
        Woodbury("cg")  # type: ignore[arg-type]
