"""Laws that every operator obeys, tested on everything in the registry."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvpop import Dense, LinearOperator
from hvpop.operators.crossing import working_dtype

from .registry import OPERATORS, OVER_DATA, case, entries

pytestmark = pytest.mark.parametrize("name", OPERATORS)

Draw = tuple[int, int, float]  # seed, columns, scale

COEFFICIENTS = st.floats(-4, 4, width=16)
DRAWS = st.tuples(st.integers(0, 999), st.integers(1, 3), st.sampled_from([1.0, 0.0, 1e-4, 1e4]))
few = settings(max_examples=8)  # of each law, for each operator


def operands(A: LinearOperator, draw: Draw) -> tuple[Tensor, Tensor]:
    """Columns for ``A``, ``(n, k)``, and for its transpose, ``(m, k)``."""
    (m, n), (seed, k, scale) = A.shape, draw
    both = scale * entries(n, k, seed=seed), scale * entries(m, k, seed=seed + 1000)
    return both[0].to(working_dtype(A.torch_dtype)), both[1].to(working_dtype(A.torch_dtype))


def assert_close(A: LinearOperator, found: Tensor, expected: Tensor, size: float) -> None:
    """Equal to rounding: ``size`` bounds the numbers that were added up on the way.

    A product of operators of order n rounds each entry about n times per factor; 64 leaves room for
    the few factors of a composite, and for the functions inside a Hessian.
    """
    info = torch.finfo(working_dtype(A.torch_dtype))
    allowed = 64 * max(1, *A.shape) * info.eps * size + info.tiny
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= allowed


def size_of(name: str, V: Tensor) -> float:
    return float((1 + case(name)[1].norm()) * (1 + V.double().norm()))


@few
@given(draw=DRAWS)
def test_a_product_is_that_of_the_matrix(name: str, draw: Draw) -> None:
    A, matrix = case(name)
    V, U = operands(A, draw)
    assert_close(A, A @ V, matrix @ V.double(), size_of(name, V))
    assert_close(A, A.rmatmat(U), matrix.T @ U.double(), size_of(name, U))
    assert_close(A, U.T @ A, U.T.double() @ matrix, size_of(name, U))


@few
@given(draw=DRAWS, a=COEFFICIENTS, b=COEFFICIENTS)
def test_products_are_linear(name: str, draw: Draw, a: float, b: float) -> None:
    A, _ = case(name)
    V, _ = operands(A, draw)
    W = entries(*V.shape, dtype=V.dtype)
    size = 4 * (size_of(name, V) + size_of(name, W))
    assert_close(A, A @ (a * V + b * W), a * (A @ V) + b * (A @ W), size)


@few
@given(draw=DRAWS)
def test_the_transpose_is_the_adjoint(name: str, draw: Draw) -> None:
    A, _ = case(name)
    V, U = operands(A, draw)
    size = size_of(name, V) * size_of(name, U)
    assert_close(A, U.T @ (A @ V), (A.T @ U).T @ V, size)
    # not to the bit: BLAS rounds by how its operands lie in memory
    assert_close(A, A.T @ U, A.rmatmat(U), size_of(name, U))
    assert_close(A, A.H @ U, A.rmatmat(U), size_of(name, U))
    assert_close(A, A.T.T @ V, A @ V, size_of(name, V))


def test_what_calls_itself_symmetric_is(name: str) -> None:
    A, matrix = case(name)
    if A.symmetric:
        assert A.T.symmetric
        assert_close(A, matrix, matrix.T, size_of(name, matrix))


@few
@given(draw=DRAWS)
def test_a_block_product_is_its_column_products(name: str, draw: Draw) -> None:
    A, _ = case(name)
    V, U = operands(A, draw)
    for X, matmat, matvec in ((V, A.matmat, A.matvec), (U, A.rmatmat, A.rmatvec)):
        one_by_one = torch.stack([matvec(x) for x in X.T], dim=1)
        assert_close(A, matmat(X), one_by_one, size_of(name, X))
        assert matvec(X[:, :1]).shape == one_by_one[:, :1].shape


@few
@given(draw=DRAWS)
def test_numpy_and_torch_agree(name: str, draw: Draw) -> None:
    A, _ = case(name)
    V, U = operands(A, draw)
    for product, operand in (
        (A.matmat, V),
        (A.rmatmat, U),
        (A.matvec, V[:, 0]),
        (A.rmatvec, U[:, :1]),
        (A.dot, V),
    ):
        in_numpy, in_torch = product(operand.numpy()), product(operand)
        assert isinstance(in_numpy, np.ndarray)
        assert in_numpy.dtype == A.dtype
        assert in_torch.dtype == operand.dtype
        assert_close(A, torch.from_numpy(in_numpy), in_torch, size_of(name, operand))


@few
@given(draw=DRAWS, torch_in=st.booleans())
def test_operands_are_neither_written_nor_kept(name: str, draw: Draw, torch_in: bool) -> None:
    A, _ = case(name)
    for X, product in zip(operands(A, draw), (A.matmat, A.rmatmat), strict=True):
        operand: Any = X.clone() if torch_in else X.numpy().copy()
        result = product(operand)
        assert np.array_equal(operand, X)
        kept = copy.deepcopy(result)
        operand[...] = 77.0  # solvers reuse their buffers
        assert np.array_equal(result, kept)
        result[...] = 55.0
        again = torch.as_tensor(product(X if torch_in else X.numpy()))
        assert_close(A, again, torch.as_tensor(kept), size_of(name, X))


@few
@given(draw=DRAWS)
def test_a_sum_adds_products(name: str, draw: Draw) -> None:
    A, _ = case(name)
    B = Dense(entries(*A.shape, seed=9, dtype=A.torch_dtype))
    V, U = operands(A, draw)
    size = size_of(name, V) + size_of(name, U) + 8.0 * float(V.norm() + U.norm())
    assert_close(A, (A + B) @ V, A @ V + B @ V, size)
    assert_close(A, (A - B).T @ U, A.T @ U - B.T @ U, size)


@few
@given(draw=DRAWS, c=COEFFICIENTS)
def test_a_multiple_multiplies_products(name: str, draw: Draw, c: float) -> None:
    A, _ = case(name)
    V, _ = operands(A, draw)
    assert torch.equal((c * A) @ V, c * (A @ V))
    assert torch.equal((A * c) @ V, c * (A @ V))
    assert torch.equal(-A @ V, -(A @ V))


@few
@given(draw=DRAWS)
def test_a_product_transposes_in_reverse(name: str, draw: Draw) -> None:
    A, matrix = case(name)
    B = Dense(entries(A.shape[1], 3, seed=9, dtype=A.torch_dtype))
    _, U = operands(A, draw)
    size = 8 * size_of(name, U)
    assert_close(A, (A @ B).T @ U, B.T @ (A.T @ U), size)
    assert_close(A, (A @ B).T @ U, (B.T @ A.T) @ U, size)
    assert_close(A, (B.T @ A.T).to_dense(), B.matrix.double().T @ matrix.T, size)


@few
@given(draw=DRAWS)
def test_complex_columns_multiply_by_their_parts(name: str, draw: Draw) -> None:
    A, _ = case(name)
    X = operands(A, draw)[0]
    Y = entries(*X.shape).to(X.dtype)
    product = A @ (X.numpy() + 1j * Y.numpy())
    assert_close(A, torch.from_numpy(product.real.copy()), A @ X, size_of(name, X))
    assert_close(A, torch.from_numpy(product.imag.copy()), A @ Y, size_of(name, Y))


def test_products_repeat_to_the_last_bit(name: str) -> None:
    A, _ = case(name)
    V = entries(A.shape[1], 3, dtype=working_dtype(A.torch_dtype))
    assert torch.equal(A @ V, A @ V)


def test_no_columns_give_no_columns(name: str) -> None:
    A, _ = case(name)
    m, n = A.shape
    empty = torch.zeros(n, 0, dtype=A.torch_dtype)
    assert (A @ empty).shape == (m, 0)
    assert (A @ empty).dtype is A.torch_dtype
    assert (A @ np.zeros((n, 0))).shape == (m, 0)
    assert (A.T @ np.zeros((m, 0))).shape == (n, 0)


@few
@given(draw=DRAWS)
def test_the_forms_of_batches_average_to_that_of_the_matrix(name: str, draw: Draw) -> None:
    A, matrix = case(name)
    V, _ = operands(A, draw)
    forms = A.batch_forms(V) if A.shape[0] == A.shape[1] else None
    assert (forms is not None) == (name in OVER_DATA)
    if forms is not None:
        expected = (V.double() * (matrix @ V.double())).sum(0)
        assert_close(A, forms.average(), expected, size_of(name, V) * float(1 + V.norm()))
        assert forms.values.shape == (*forms.weights.shape, V.shape[1])
        assert forms.values.dtype is forms.weights.dtype is torch.float64
        assert forms.standard_error().shape == (V.shape[1],)


def test_to_dense_is_the_matrix(name: str) -> None:
    A, matrix = case(name)
    found = A.to_dense()
    assert found.dtype is working_dtype(A.torch_dtype)
    assert_close(A, found, matrix, size_of(name, matrix))
    assert_close(A, A.T.to_dense(), matrix.T, size_of(name, matrix))


def test_linearizing_keeps_the_matrix(name: str) -> None:
    A, matrix = case(name)
    frozen = A.linearize()
    assert frozen.shape == A.shape
    assert frozen.torch_dtype is A.torch_dtype
    assert frozen.symmetric == A.symmetric
    assert frozen.is_current()
    assert_close(A, frozen.to_dense(), matrix, size_of(name, matrix))


def test_no_mode_of_torch_changes_a_product(name: str) -> None:
    A, _ = case(name)
    V = entries(A.shape[1], 2, dtype=working_dtype(A.torch_dtype))
    expected = A @ V
    for mode in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.enable_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        with mode:
            assert torch.equal(A @ V, expected)
    with torch.inference_mode():
        made_there = V.clone()
    assert torch.equal(A @ made_there, expected)


def test_results_are_plain_contiguous_tensors_without_a_graph(name: str) -> None:
    A, _ = case(name)
    V = entries(A.shape[1], 2, dtype=working_dtype(A.torch_dtype)).requires_grad_()
    result = A @ V
    assert not result.requires_grad
    assert result.is_contiguous()
    assert V.grad is None
