"""What a user is told: where a solver did not converge, what a callback gets, how to wrap what is not ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import aslinearoperator, eigsh

from hvpop import Dense, Diagonal, FromFunction, Identity, LowRank
from hvpop.solvers import (
    Direct,
    Inverse,
    NotConverged,
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

from .problems import F64, dense, generator, normal, powers

A = Diagonal(torch.linspace(1, 2, 6, dtype=F64))
b = torch.ones(6, dtype=F64)
HARD = dense(powers(-6, 60))

short = partial(cg, max_steps=2)
PRODUCTS: dict[str, tuple[Callable[[], Any], str]] = {
    "product": (lambda: Inverse(HARD, short) @ normal(60), "max_steps"),
    "expression": (lambda: (HARD @ Inverse(HARD, short) + Identity(60)) @ normal(60), "max_steps"),
    "array": (lambda: Inverse(HARD, short).matvec(np.ones(60)), "max_steps"),
    "scipy": (lambda: eigsh(Inverse(HARD, short), k=1, tol=0.5), "max_steps"),
    "transpose": (lambda: Inverse(Dense(normal(6, 6)), partial(lsmr, max_steps=1)).T @ b, "max_"),
    "function": (lambda: matrix_function(HARD, "invsqrt", max_steps=2) @ normal(60), "max_steps"),
    "indefinite": (lambda: Inverse(-1 * HARD) @ normal(60), "solve by minres"),
    "stagnated": (lambda: Inverse(HARD, partial(cg, rtol=0.0)) @ normal(60), "loosen rtol"),
    "nested": (
        lambda: Inverse(HARD, partial(cg, preconditioner=Inverse(HARD, short))) @ normal(60),
        "max_",
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_did_not_converge_warns_at_the_callers_line_and_names_the_cure(name: str) -> None:
    call, cure = PRODUCTS[name]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    seen = [warning for warning in seen if warning.category is NotConverged]
    assert seen
    assert {warning.filename for warning in seen} == {__file__}
    assert cure in str(seen[-1].message)


def test_a_direct_solve_without_digits_warns_at_the_callers_line() -> None:
    near = Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-50]], dtype=F64))
    with pytest.warns(NotConverged, match="damp it, or use lsmr") as seen:
        Direct()(near, torch.tensor([1.0, -1.0], dtype=F64))
    assert seen[0].filename == __file__


SOLVERS: dict[str, Callable[..., Any]] = {
    "cg": cg,
    "block_cg": block_cg,
    "minres": minres,
    "lsmr": lsmr,
    "multishift_cg": lambda A, b, **options: multishift_cg(A, b, [0.0], **options),
    "steihaug": lambda A, b, **options: steihaug(A, b, 10.0, rtol=1e-8, **options),
}
SCIPY_STYLE: dict[str, Callable[[Any], Any]] = {
    "norm": lambda xk: np.linalg.norm(xk - 1.0),
    "copy": lambda xk: xk.copy(),
    "product": lambda xk: np.ones(6) - A @ xk,
    "entry": lambda xk: xk[0],
}


@pytest.mark.parametrize("style", SCIPY_STYLE)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_callback_written_for_scipy_is_told_what_it_gets(name: str, style: str) -> None:
    with pytest.raises(
        TypeError, match=rf"(?s){name}: its callback .*a Step with .*x.*lambda step"
    ):
        SOLVERS[name](A, b, callback=SCIPY_STYLE[style])


def test_an_error_of_the_callbacks_own_is_raised_as_it_is() -> None:
    def failing(step: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        cg(A, b, callback=failing)


STRANGERS = {
    "ndarray": (np.eye(6), "hvpop.Dense"),
    "sparse": (scipy.sparse.eye_array(6).tocsr(), r"A\.toarray\(\)"),
    "scipy": (aslinearoperator(np.eye(6)), r"hvpop\.FromFunction"),
    "tensor": (torch.eye(6), "hvpop.Dense"),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_no_operator_is_told_how_to_become_one(name: str, kind: str) -> None:
    stranger, cure = STRANGERS[kind]
    with pytest.raises(TypeError, match=cure):
        SOLVERS[name](stranger, b)
    if name in ("cg", "minres", "steihaug"):
        with pytest.raises(TypeError, match=f"preconditioner expects .*{cure}"):
            SOLVERS[name](A, b, preconditioner=stranger)


def test_the_advice_for_an_operator_of_scipy_works() -> None:
    M = aslinearoperator(np.diag(np.linspace(1, 2, 6)))
    wrapped = FromFunction(lambda V: torch.as_tensor(M @ V.cpu().numpy()), M.shape, symmetric=True)
    torch.testing.assert_close(cg(wrapped, b).x, cg(A, b).x)


def test_a_low_rank_operator_with_equal_factors_is_symmetric() -> None:
    U = normal(6, 2)
    equal = LowRank(U, torch.ones(2, dtype=F64), U.clone())
    assert equal.symmetric
    assert LowRank(U.numpy(), None, U.numpy().copy()).symmetric
    assert not LowRank(U, None, normal(6, 2, seed=1)).symmetric
    assert not LowRank(U, None, normal(4, 2)).symmetric


def test_symmetric_is_only_advised_to_those_that_take_it() -> None:
    with pytest.raises(ValueError, match=r"build it with symmetric=True"):
        cg(Dense(normal(6, 6)), b)
    with pytest.raises(ValueError, match="leave W out") as refused:
        cg(LowRank(normal(6, 2), None, normal(6, 2, seed=1)), b)
    assert "symmetric=True" not in str(refused.value)
    product = Dense(normal(6, 6)) @ A
    with pytest.raises(ValueError, match=r"say so: FromFunction\(A\.matmat"):
        cg(product, b)
    said = FromFunction(
        (A @ A).matmat, A.shape, dtype=A.torch_dtype, device=A.device, symmetric=True
    )
    assert cg(said, b).converged


@pytest.mark.parametrize("solve", [cg, minres, partial(steihaug, radius=10.0)])
def test_a_preconditioner_with_a_null_space_is_refused(solve: Callable[..., Any]) -> None:
    null = Diagonal(torch.tensor([0.0, 1.0], dtype=F64))
    two = Diagonal(torch.tensor([2.0, 3.0], dtype=F64))
    for right in ([1.0, 0.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match=r"not positive definite.*r'Mr = 0.*Damp it"):
            solve(two, torch.tensor(right, dtype=F64), preconditioner=null)


def test_a_preconditioner_that_is_not_finite_raises() -> None:
    bad = Diagonal(torch.tensor([torch.nan, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=F64))
    for solve in (cg, minres):
        with pytest.raises(FloatingPointError, match=r"preconditioner.*not finite"):
            solve(A, b, preconditioner=bad)


def test_generators_are_seeds_of_preconditioners() -> None:
    one, two = (nystrom(HARD, 5, 0.1, seed=generator(3)).eigenvalues for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(*(jacobi(HARD, seed=generator(3)).d for _ in range(2)))
    with pytest.raises(TypeError, match=r"jacobi expects seed as an integer or a torch\.Generator"):
        jacobi(HARD, seed=None)  # type: ignore[arg-type]


class Overflowing(Diagonal):
    """One product of it is too large for its numbers, the ones after it are not."""

    count = 0

    def _apply(self, V: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super()._apply(V) * (torch.inf if self.count == 5 else 1.0)


@pytest.mark.parametrize("solve", [cg, minres, lsmr, block_cg])
def test_one_product_that_overflows_is_no_solution(solve: Any) -> None:
    """Right: no answer. `lsmr` called it "converged", as 1 / inf is a small step."""
    A = Overflowing(torch.linspace(1, 10, 200, dtype=torch.float64))
    b = torch.ones(200, 1, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=f"{solve.__name__}.*not finite.*look for"):
        solve(A, b)


def test_no_cure_costs_the_imaginary_part() -> None:
    A, z = Diagonal(torch.ones(3)), torch.ones(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"torch\.view_as_real"):
        A @ z
    with pytest.raises(TypeError, match=r"torch\.view_as_real"):
        cg(A, z)
    assert torch.equal(A @ torch.view_as_real(z), torch.tensor([[1.0, 0.0]] * 3))  # the cure
