"""SciPy's routines take an operator as it is, and find what they find for its dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.sparse.linalg as sla
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvpop import Dense, HessianOperator, Identity, LinearOperator

from .registry import BF16, dense, entries, hessian

Array = NDArray[Any]
Routine = Callable[[Any, Array], Array]  # (operator or matrix, right-hand sides) -> what it finds

HESSIAN, MATRIX = hessian()[0], hessian()[1].numpy()
N = MATRIX.shape[0]
b, B = entries(N, seed=3).numpy(), entries(N, 3, seed=4).numpy()
SHIFT = 0.5 - np.linalg.eigvalsh(MATRIX)[0]  # makes the smallest eigenvalue 1/2

POSITIVE = {
    "a sum": lambda: HESSIAN + SHIFT * Identity.like(HESSIAN),
    "a frozen sum": lambda: (HESSIAN + SHIFT * Identity.like(HESSIAN)).linearize(),
    "a matrix": lambda: Dense(POSITIVE_MATRIX, symmetric=True),
    "SciPy's sum": lambda: HESSIAN + sla.aslinearoperator(SHIFT * np.eye(N)),
}
POSITIVE_MATRIX = MATRIX + SHIFT * np.eye(N)
CONDITION = np.linalg.cond(POSITIVE_MATRIX)


def solution(solver: Callable[..., Any], **options: Any) -> Routine:
    """The solution of an iterative solver, which must say that it converged."""

    def routine(A: Any, b: Array) -> Array:
        x, info, *_ = solver(A, b, **options)
        assert info in ((0,) if solver in (sla.cg, sla.minres, sla.gmres) else (1, 2, 4, 5))
        return x

    return routine


def spanned(values: Array, vectors: Array) -> Array:
    """The part of a matrix that these eigenvalues and eigenvectors make, which has no signs."""
    return (vectors * values) @ vectors.T


def lobpcg(A: Any, _: Array) -> Array:
    return spanned(*sla.lobpcg(A, B, largest=True, tol=1e-11, maxiter=200))


def exact_top(A: Array, k: int) -> Array:
    values, vectors = np.linalg.eigh(A)
    return spanned(values[-k:], vectors[:, -k:])


ROUTINES: dict[str, tuple[Routine, Callable[[Array, Array], Array]]] = {
    "cg": (solution(sla.cg, rtol=1e-12), np.linalg.solve),
    "minres": (solution(sla.minres, rtol=1e-13), np.linalg.solve),
    "gmres": (solution(sla.gmres, rtol=1e-12, restart=N), np.linalg.solve),
    "lsmr": (solution(sla.lsmr, atol=1e-13, btol=1e-13), np.linalg.solve),
    "lsqr": (solution(sla.lsqr, atol=1e-13, btol=1e-13), np.linalg.solve),
    "eigsh": (lambda A, b: spanned(*sla.eigsh(A, k=3, v0=b)), lambda A, b: exact_top(A, 3)),
    "eigsh smallest": (
        lambda A, b: np.sort(sla.eigsh(A, k=2, which="SA", v0=b, return_eigenvectors=False)),
        lambda A, b: np.linalg.eigvalsh(A)[:2],
    ),
    "lobpcg": (lobpcg, lambda A, b: exact_top(A, 3)),
    "svds": (
        lambda A, b: np.sort(sla.svds(A, k=3, v0=b, return_singular_vectors=False)),
        lambda A, b: np.linalg.svd(A)[1][2::-1],
    ),
    "onenormest": (lambda A, b: sla.onenormest(A, t=5), lambda A, b: np.linalg.norm(A, 1)),
    "expm_multiply": (
        lambda A, b: sla.expm_multiply(A, b, traceA=np.trace(POSITIVE_MATRIX)),
        lambda A, b: scipy.linalg.expm(A) @ b,
    ),
    "expm_multiply, a block": (
        lambda A, b: sla.expm_multiply(-1.0 * A, B, traceA=-np.trace(POSITIVE_MATRIX)),
        lambda A, b: scipy.linalg.expm(-A) @ B,
    ),
}
if hasattr(sla, "funm_multiply_krylov"):  # SciPy 1.16
    ROUTINES["funm_multiply_krylov"] = (
        lambda A, b: sla.funm_multiply_krylov(scipy.linalg.expm, A, b, restart_every_m=N),
        lambda A, b: scipy.linalg.expm(A) @ b,
    )


@pytest.mark.parametrize("operator", POSITIVE)
@pytest.mark.parametrize("routine", ROUTINES)
def test_a_routine_finds_what_the_dense_matrix_gives(routine: str, operator: str) -> None:
    find, exact = ROUTINES[routine]
    expected = exact(POSITIVE_MATRIX, b)
    found = find(POSITIVE[operator](), b)
    assert np.linalg.norm(found - expected) <= 1e-10 * CONDITION * np.linalg.norm(expected)


def test_least_squares_and_singular_values_of_a_rectangular_operator() -> None:
    A, matrix = dense(9, 4)
    M, y = matrix.numpy(), entries(9).numpy()
    expected = np.linalg.lstsq(M, y, rcond=None)[0]
    for solver in (sla.lsmr, sla.lsqr):
        found = solution(solver, atol=1e-14, btol=1e-14)(A, y)
        assert np.linalg.norm(found - expected) <= 1e-11 * np.linalg.norm(expected)
    U, s, Wt = sla.svds(A, k=2, v0=entries(4).numpy())
    assert np.allclose(np.sort(s), np.linalg.svd(M)[1][1::-1], rtol=1e-12)
    assert np.allclose(M @ Wt.T, U * s, atol=1e-12)


class Counting(LinearOperator):
    """Remembers how many columns each product had."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(A.shape, dtype=A.torch_dtype, device=A.device, symmetric=A.symmetric)
        self.A, self.columns = A, list[int]()

    def _apply(self, V: Tensor) -> Tensor:
        self.columns.append(V.shape[1])
        return self.A._apply(V)


@pytest.mark.parametrize(
    ("routine", "width"), [("lobpcg", 3), ("onenormest", 5), ("expm_multiply, a block", 3)]
)
def test_block_methods_multiply_blocks_not_columns(routine: str, width: int) -> None:
    A = Counting(POSITIVE["a sum"]())
    ROUTINES[routine][0](A, b)
    assert max(A.columns) == width
    assert len(A.columns) < 0.7 * sum(A.columns)  # blocks shrink as their columns converge


EXPRESSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "A + S": lambda A, S: A + S,
    "S + A": lambda A, S: S + A,
    "A - S": lambda A, S: A - S,
    "S - A": lambda A, S: S - A,
    "A @ S": lambda A, S: A @ S,
    "S @ A": lambda A, S: S @ A,
    "S * A": lambda A, S: S @ A if isinstance(S, np.ndarray) else S * A,
    "A.dot(S)": lambda A, S: A.dot(S),
    "2 (S + A)'": lambda A, S: 2.0 * (S + A).T,
    "(A @ S)^H": lambda A, S: (A @ S).conj().T if isinstance(S, np.ndarray) else (A @ S).H,
    "A.T @ S + A": lambda A, S: A.T @ S + A,
    "(S @ A) @ A - S / 3": lambda A, S: (S @ A) @ A - S / 3,
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_scipys_operators_combine_with_ours_on_either_side(expression: str) -> None:
    (A, matrix), S = dense(4, 4), entries(4, 4, seed=1).numpy()
    combine = EXPRESSIONS[expression]
    ours, expected = combine(A, sla.aslinearoperator(S)), combine(matrix.numpy(), S)
    v, V = entries(4, seed=2).numpy(), entries(4, 3, seed=2).numpy()
    assert isinstance(ours, sla.LinearOperator)
    for found, right in (
        (ours @ v, expected @ v),
        (ours @ V, expected @ V),
        (ours.rmatvec(v), expected.T @ v),
        (ours.rmatmat(V), expected.T @ V),
        (ours.T @ v, expected.T @ v),
        (v @ ours, v @ expected),
    ):
        assert np.allclose(found, right, rtol=0, atol=1e-13 * np.linalg.norm(expected) * 10)


def test_as_linear_operator_returns_the_operator_itself() -> None:
    assert sla.aslinearoperator(HESSIAN) is HESSIAN


def test_half_precision_solves_in_float32() -> None:
    M = entries(12, 12, dtype=BF16)
    A = Dense(M + M.T, symmetric=True)
    expected = np.linalg.eigvalsh((M + M.T).double().numpy())
    found = sla.eigsh(A, k=3, v0=np.ones(12), return_eigenvectors=False)
    assert found.dtype == np.float32
    assert np.allclose(np.sort(np.abs(found)), np.sort(np.abs(expected))[-3:], rtol=1e-5)


# -- optimization ---------------------------------------------------------------------------------


class Regression:
    """Penalized softmax regression as a function of the flat parameters: strictly convex."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Linear(3, 3).double()
        self.X, self.y = 2 * entries(12, 3), torch.arange(12) % 3
        self.H = HessianOperator(self.model, self.loss, [(self.X, self.y)])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.model.parameters())
        return nn.functional.cross_entropy(outputs, targets) + 0.05 * penalty

    def at(self, x: Array) -> Regression:
        nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), self.model.parameters())
        return self

    def value_and_gradient(self, x: Array) -> tuple[float, Array]:
        loss = self.at(x).loss(self.model(self.X), self.y)
        gradient = torch.autograd.grad(loss, list(self.model.parameters()))
        return loss.item(), torch.cat([g.flatten() for g in gradient]).numpy()


@pytest.mark.parametrize("method", ["Newton-CG", "trust-krylov", "trust-ncg", "trust-constr"])
@pytest.mark.parametrize("argument", ["hess", "hessp"])
def test_minimize_takes_the_steps_that_it_takes_with_the_dense_hessian(
    method: str, argument: str
) -> None:
    problem = Regression()
    options: dict[str, Any] = {"xtol": 1e-8} if method == "Newton-CG" else {"gtol": 1e-8}
    ours: dict[str, Callable[..., Any]] = {
        "hess": lambda x: problem.at(x).H.linearize(),
        "hessp": lambda x, p: problem.at(x).H @ p,
    }
    theirs = {
        "hess": lambda x: problem.at(x).H.to_dense().numpy(),
        "hessp": lambda x, p: problem.at(x).H.to_dense().numpy() @ p,
    }
    found, expected = (
        scipy.optimize.minimize(
            problem.value_and_gradient,
            np.full(12, 0.3),
            jac=True,
            method=method,
            options=options,
            **{argument: hessian[argument]},
        )
        for hessian in (ours, theirs)
    )
    assert found.success or (method == "trust-constr" and found.status in (1, 2))
    assert np.linalg.norm(problem.value_and_gradient(found.x)[1]) < 1e-6
    assert np.allclose(found.x, expected.x, atol=1e-6)
    assert abs(found.nit - expected.nit) <= 1


class Valley(nn.Module):
    """Rosenbrock's function of three parameters, on whose way down trust regions reject steps."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([-1.2, 1.0, 2.0], dtype=torch.float64))

    def forward(self, one: Tensor) -> Tensor:
        p = self.p
        return one * (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()


@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg", "trust-constr"])
def test_a_frozen_hessian_stays_put_when_a_step_is_rejected(method: str) -> None:
    model, one = Valley(), torch.ones(1, dtype=torch.float64)
    H = HessianOperator(model, lambda value, _: value.sum(), [(one, one)])

    def move(x: Array) -> None:
        nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), model.parameters())

    def value_and_gradient(x: Array) -> tuple[float, Array]:
        move(x)
        value = model(one).sum()
        return value.item(), torch.autograd.grad(value, model.p)[0].numpy()

    def frozen(x: Array) -> LinearOperator:
        move(x)
        return H.linearize()  # H itself would follow the model to the point that is then rejected

    start = model.p.detach().numpy().copy()
    found = scipy.optimize.minimize(
        value_and_gradient, start, jac=True, hess=frozen, method=method, options={"maxiter": 300}
    )
    assert found.fun < 1e-8
    assert np.allclose(found.x, 1.0, atol=1e-4)


# -- NumPy functions ------------------------------------------------------------------------------


def test_np_dot_multiplies_from_either_side() -> None:
    A, matrix = dense(3, 4)
    M = matrix.numpy()
    v, u, V = entries(4).numpy(), entries(3).numpy(), entries(4, 2).numpy()
    assert np.allclose(np.dot(A, v), M @ v, atol=1e-14)
    assert np.allclose(np.dot(A, V), M @ V, atol=1e-14)
    assert np.allclose(np.dot(u, A), u @ M, atol=1e-14)
    assert np.allclose(np.dot(2.0, A) @ v, 2 * M @ v, atol=1e-14)
    assert np.allclose(np.dot(A, A.T) @ u, M @ M.T @ u, atol=1e-14)
    S = sla.aslinearoperator(entries(3, 3).numpy())
    assert np.allclose(np.dot(S, A) @ v, S @ (M @ v), atol=1e-14)


def test_other_numpy_functions_are_let_through() -> None:
    A, _ = dense(3, 4)
    assert np.shape(A) == (3, 4)
    assert np.ndim(A) == 2
    assert not np.isscalar(A)
    assert np.result_type(A, np.float32) == np.float64
    assert np.array_equal(np.atleast_1d(A), [A])
    assert not np.iscomplexobj(A)
