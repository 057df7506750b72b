"""Arrays and tensors of every kind, as operands and as the entries of operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvpop import Damped, Dense, Diagonal, Identity

from .registry import BF16, F16, F32, F64, entries, symmetric

S = symmetric(4)[0]


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


BASE = np.arange(12.0).reshape(4, 3) - 5

ARRAYS: dict[str, Any] = {
    "read-only": read_only(BASE),
    "not contiguous": np.repeat(BASE, 2, axis=1)[:, ::2],
    "negative strides": BASE[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran order": np.asfortranarray(BASE),
    "integers": BASE.astype(np.int32),
    "float16": BASE.astype(np.float16),
    "long double": BASE.astype(np.longdouble),
    "big-endian": BASE.astype(">f8"),
    "matrix": np.asmatrix(BASE),
    "broadcast": np.broadcast_to(BASE[:, :1], (4, 3)),
    "lists": BASE.tolist(),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind_multiply(kind: str) -> None:
    array = ARRAYS[kind]
    plain = np.array(array, dtype=np.float64)
    M = S.to_dense().numpy()
    product = S @ array
    assert type(product) is np.ndarray
    assert product.dtype == np.float64
    assert np.allclose(product, M @ plain, atol=1e-13)
    assert np.allclose(S.matvec(np.asarray(array)[:, 1]), M @ plain[:, 1], atol=1e-13)


RECORDS = np.zeros(4, dtype=[("tag", "i4"), ("value", "f8")])  # fields 12 bytes apart
RECORDS["value"] = BASE[:, 1]
UNALIGNED = np.zeros(33, dtype=np.uint8)[1:].view(np.float64)
UNALIGNED[:] = BASE[:, 1]
VECTORS: dict[str, Any] = {
    "negative stride": BASE[::-1, 1],
    "one column, negative stride": BASE[:, 1:2][:, ::-1],
    "one column, both negative": BASE[:, 1:2][::-1, ::-1],
    "one column of a matrix": BASE[:, 1:2],
    "broadcast": np.broadcast_to(2.0, (4,)),
    "field of records": RECORDS["value"],
    "not aligned": UNALIGNED,
    "read-only": read_only(BASE[:, 1]),
    "big-endian": BASE[:, 1].astype(">f4"),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_of_every_stride_multiply(kind: str) -> None:
    x = VECTORS[kind]
    plain = np.array(x, dtype=np.float64)
    M = S.to_dense().numpy()
    assert np.allclose(S @ x, M @ plain, atol=1e-13)
    assert np.allclose(S.rmatvec(x), M.T @ plain, atol=1e-13)
    assert np.allclose(S @ (x + 0j)[::-1], M @ plain[::-1], atol=1e-13)
    entries = plain.reshape(-1)
    assert np.allclose(Diagonal(x.reshape(-1)) @ np.ones(4), entries, atol=0)


def test_a_single_number_of_any_stride_multiplies() -> None:
    two = Dense(np.array([[2.0]])[::-1, ::-1])
    for x in (np.ones(1)[::-1], np.ones((1, 1))[::-1, ::-1], np.ones((3, 2))[::3, ::-2]):
        assert (two @ x).item() == 2


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind_make_operators(kind: str) -> None:
    array = ARRAYS[kind]
    plain = torch.from_numpy(np.array(array, dtype=np.float64))
    assert torch.equal(Dense(array).to_dense().double(), plain)
    column = np.asarray(array)[:, 1]
    assert torch.equal(Diagonal(column).to_dense().double(), plain[:, 1].diag())
    assert torch.equal(Damped(0.0 * S, column).to_dense(), plain[:, 1].diag())


def test_complex_arrays_multiply_in_the_operators_precision() -> None:
    z = np.ones(4) + 2j * np.arange(4)
    product = S @ z
    assert product.dtype == np.complex128
    assert np.allclose(product, S.to_dense().numpy() @ z, atol=1e-13)
    assert (Dense(S.matrix.float()) @ z).dtype == np.complex64


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_shows_float32_to_numpy_and_gives_tensors_back_in_kind(
    dtype: torch.dtype,
) -> None:
    operator = Dense(entries(4, 4, dtype=dtype))
    v = entries(4, dtype=dtype)
    exact = operator.matrix.double() @ v.double()
    assert operator.dtype == np.float32
    assert operator.torch_dtype is dtype
    assert (operator @ v).dtype is dtype
    assert (operator @ v.float()).dtype is F32
    assert (operator @ np.ones(4)).dtype == np.float32
    assert torch.allclose((operator @ v.float()).double(), exact, atol=1e-5)  # summed in float32
    assert torch.equal(operator @ v, (operator @ v.float()).to(dtype))


def test_products_stay_on_the_operators_device() -> None:
    operator = 2.0 * Identity(3, device="meta") + Diagonal(torch.ones(3, dtype=F64, device="meta"))
    result = operator @ torch.ones(3, dtype=F64, device="meta")
    assert result.device.type == "meta"
    assert result.shape == (3,)


def test_an_empty_operator_multiplies_nothing() -> None:
    assert (Identity(0) @ np.zeros(0)).shape == (0,)
    assert (Dense(torch.zeros(3, 0)) @ np.zeros(0)).tolist() == [0, 0, 0]
    assert (Dense(torch.zeros(0, 3)) @ np.ones((3, 2))).shape == (0, 2)
