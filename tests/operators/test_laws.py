"""Laws that every operator obeys, tested on everything in the registry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvpop import Dense, Diagonal, FromFunction, LinearOperator
from hvpop.testing import DRAWN, LAWS, Draw, Subject, check_operator

from .registry import OPERATORS, OVER_DATA, case

COEFFICIENTS = st.floats(-4, 4, width=16)
DRAWS = st.builds(
    Draw,
    seed=st.integers(0, 999),
    columns=st.integers(1, 3),
    scale=st.sampled_from([1.0, 0.0, 1e-4, 1e4]),
    a=COEFFICIENTS,
    b=COEFFICIENTS,
    in_torch=st.booleans(),
)


@pytest.mark.parametrize("law", [law for law in LAWS if law in DRAWN])
@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=8)  # of each law, for each operator
@given(draw=DRAWS)
def test_every_operator_obeys(name: str, law: str, draw: Draw) -> None:
    LAWS[law](Subject(*case(name)), draw)


@pytest.mark.parametrize("law", [law for law in LAWS if law not in DRAWN])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_obeys_once(name: str, law: str) -> None:
    LAWS[law](Subject(*case(name)), Draw(columns=3))


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_transpose_and_forms_where_it_averages(name: str) -> None:
    subject = Subject(*case(name))
    A, V = subject.A, subject.operands(Draw())[0]
    assert subject.transposes
    square = A.shape[0] == A.shape[1]
    assert (square and A.batch_forms(V) is not None) == (name in OVER_DATA)


# -- check_operator, for operators of others ------------------------------------------------------


class Flawed(LinearOperator):
    """The second differences along a chain, with one flaw."""

    def __init__(self, flaw: str = "", n: int = 6) -> None:
        super().__init__((n, n), dtype=torch.float64, device="cpu", symmetric=True)
        self.flaw, self.calls = flaw, 0

    def _apply(self, V: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(V, (0, 0, 1, 1))
        result = 2 * V - padded[:-2] - padded[2:]
        self.calls += 1
        if self.flaw == "writes":
            V.zero_()
        elif self.flaw == "affine":
            result = result + 1
        elif self.flaw == "not symmetric":
            result = result + V.roll(1, 0)
        elif self.flaw == "random":
            result = result * (1 + 1e-9 * self.calls)
        elif self.flaw == "columns":
            result = result * V.shape[1]
        return result


FLAWS = {
    "writes": "operands are neither written nor kept",
    "affine": "products are linear",
    "not symmetric": "what calls itself symmetric is",
    "random": "products repeat to the last bit",
    "columns": "a block product is its column products",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_named(flaw: str) -> None:
    with pytest.raises(AssertionError, match=FLAWS[flaw]):
        check_operator(Flawed(flaw))


def test_an_operator_without_a_flaw_passes_with_its_matrix_and_without() -> None:
    A = Flawed()
    matrix = 2 * torch.eye(6) - torch.ones(5).diag(1) - torch.ones(5).diag(-1)
    check_operator(A, matrix.double())
    check_operator(A)
    check_operator(Flawed(n=3000))
    with pytest.raises(AssertionError, match="a product is that of the matrix"):
        check_operator(A, 1.001 * matrix.double())


def test_a_transpose_may_be_missing_but_not_wrong() -> None:
    M = Dense(torch.arange(12.0).reshape(3, 4).double())
    check_operator(FromFunction(M.matmat, (3, 4)))
    check_operator(FromFunction(M.matmat, (3, 4), M.rmatmat))
    with pytest.raises(AssertionError, match="the transpose is the adjoint"):
        check_operator(FromFunction(M.matmat, (3, 4), lambda U: 2 * M.rmatmat(U)))


def test_what_is_no_operator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"check_operator expects an hvpop\.LinearOperator"):
        check_operator(torch.eye(2))  # type: ignore[arg-type]
    check_operator(Diagonal(torch.ones(2)))
