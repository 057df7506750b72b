"""What the operators refuse, each mistake by the words it is told in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from hvpop import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    FromFunction,
    Identity,
    Layout,
    LinearOperator,
    LowRank,
    Restriction,
)

from .registry import BF16, F64, NamedDense, dense, entries, symmetric

A, S = dense(3, 4)[0], symmetric(4)[0]  # general and symmetric
x = entries(4)

ONES = torch.ones(2)
half, meta = Dense(entries(4, 4, dtype=BF16)), Identity(4, device="meta")
sparse = scipy.sparse.eye_array(4).tocsr()


class InNumPy(LinearOperator):
    def _apply(self, V: torch.Tensor) -> Any:
        return V.numpy()


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "short vector": (
        ValueError,
        r"<3x4 Dense float64 cpu> expects shape \(4,\), got \(3,\)",
        lambda: A @ entries(3),
    ),
    "short array": (ValueError, r"expects shape \(4,\), got \(3,\)", lambda: A @ np.ones(3)),
    "short vector to the transpose": (
        ValueError,
        r"expects shape \(3,\), got \(4,\)",
        lambda: A.rmatvec(x),
    ),
    "short block": (ValueError, r"expects shape \(4, k\), got \(3, 4\)", lambda: A @ entries(3, 4)),
    "vector as a block": (ValueError, r"expects shape \(4, k\), got \(4,\)", lambda: A.matmat(x)),
    "block as a vector": (
        ValueError,
        r"expects shape \(4,\), got \(4, 2\)",
        lambda: A.matvec(entries(4, 2)),
    ),
    "three dimensions": (ValueError, r"got \(2, 4, 1\)", lambda: A @ entries(2, 4, 1)),
    "nothing": (TypeError, "expects real numbers, got None", lambda: A @ None),
    "objects": (TypeError, "dtype object", lambda: A @ np.ones(4, object)),
    "strings": (TypeError, "expects real numbers, got array", lambda: A @ np.array(list("abcd"))),
    "gradients in a list": (
        TypeError,
        r"<4x4 Dense .*> expects one array, got a list of 2 tensors; .* layout.flatten\(",
        lambda: S @ [entries(2), entries(2, 1)],
    ),
    "gradients by name": (TypeError, "got a dict of 1 tensors", lambda: S @ {"weight": x}),
    "parameters on the left": (TypeError, "got a tuple of 2 tensors", lambda: (x, x) @ S),
    "tensors as a diagonal": (
        TypeError,
        "Diagonal expects one array, got a list of 2 tensors",
        lambda: Diagonal([x, x]),  # type: ignore[arg-type]
    ),
    "a product that float16 cannot hold": (
        OverflowError,
        r"<2x2 Diagonal float16 cpu>: the product reaches 9e\+04, and torch.float16 ends at 65504; "
        r"multiply a float32 vector, A @ x.float\(\)",
        lambda: Diagonal(300 * ONES.half()) @ (300 * ONES.half()),
    ),
    "float32 tensor": (
        TypeError,
        r"expects dtype torch.float64, got torch.float32; use x.to\(",
        lambda: A @ x.float(),
    ),
    "integer tensor": (TypeError, "got torch.int64", lambda: A @ torch.arange(4)),
    "complex tensor": (TypeError, "got torch.complex128", lambda: A @ x.to(torch.complex128)),
    "float64 tensor to half": (
        TypeError,
        "expects dtype torch.bfloat16, got torch.float64",
        lambda: half @ x,
    ),
    "other device": (
        ValueError,
        r"expects device cpu, got meta; use x.to\(A.device\)",
        lambda: A @ x.to("meta"),
    ),
    "sparse array": (TypeError, "csr_array; use its .toarray()", lambda: S @ sparse),
    "sparse array on the left": (TypeError, "expects a dense array", lambda: sparse @ S),
    "sparse tensor": (
        TypeError,
        "use x.to_dense()",
        lambda: S @ torch.eye(4, dtype=F64).to_sparse(),
    ),
    "operator plus number": (
        TypeError,
        r"<4x4 Dense float64 cpu> \+ 0.1 is not a sum of matrices; "
        r"write A \+ 0.1 \* Identity.like\(A\)",
        lambda: S + 0.1,
    ),
    "number plus operator": (TypeError, r"write A \+ 1 \* Identity.like", lambda: 1 + S),
    "operator minus number": (TypeError, r"write A \+ -1 \* Identity.like", lambda: S - 1),
    "number minus operator": (TypeError, "not a sum of matrices", lambda: 1 - S),
    "operator plus array": (TypeError, r"A \+ Dense\(array\)", lambda: S + np.eye(4)),
    "operator minus array": (TypeError, r"A \+ Dense\(array\)", lambda: S - np.eye(4)),
    "array plus operator": (TypeError, r"A \+ Dense\(array\)", lambda: np.eye(4) + S),
    "tensor plus operator": (TypeError, r"A \+ Dense\(array\)", lambda: x + S),
    "operator plus nothing": (TypeError, "unsupported operand", lambda: S + None),
    "sum of two shapes": (
        ValueError,
        "a sum needs equal shapes, got <3x4 .* and <4x4",
        lambda: A + S,
    ),
    "product of two shapes": (
        ValueError,
        "a product needs matching shapes, got <3x4 .* @ <3x4",
        lambda: A @ A,
    ),
    "sum of two dtypes": (
        TypeError,
        "needs one dtype and device, got <4x4 Dense float64 cpu> and",
        lambda: S + half,
    ),
    "product on two devices": (TypeError, "Product needs one dtype and device", lambda: meta @ S),
    "blocks of two dtypes": (
        TypeError,
        "BlockDiagonal needs one dtype and device",
        lambda: BlockDiagonal([S, half]),
    ),
    "no blocks": (ValueError, "at least one block", lambda: BlockDiagonal([])),
    "power of a rectangle": (ValueError, "only a square operator has powers", lambda: A**2),
    "negative power": (ValueError, r"\*\* -1: expected a non-negative integer", lambda: S**-1),
    "fractional power": (ValueError, "expected a non-negative integer", lambda: S**0.5),
    "truth as a power": (ValueError, "expected a non-negative integer", lambda: S**True),
    "complex multiple": (TypeError, "cannot be scaled by the complex number 1j", lambda: 1j * S),
    "scalar matrix product": (ValueError, r"use \* to multiply by a scalar", lambda: S @ 2.0),
    "scalar matrix product, left": (ValueError, r"use \* to multiply", lambda: 2.0 @ S),
    "division by an operator": (TypeError, "can be divided by a scalar, got Dense", lambda: S / S),
    "division by nothing": (ZeroDivisionError, "division by zero", lambda: S / 0),
    "complex matrix": (TypeError, "Dense expects real numbers", lambda: Dense(1j * np.eye(2))),
    "complex diagonal": (
        TypeError,
        "Diagonal expects real numbers",
        lambda: Diagonal(torch.ones(2) * 1j),
    ),
    "complex operator": (
        TypeError,
        r"got torch.complex64; .*view_as_real",
        lambda: Identity(2, dtype=torch.complex64),
    ),
    "integer operator": (TypeError, "got torch.int64", lambda: Identity(2, dtype=torch.int64)),
    "vector as a matrix": (ValueError, "Dense expects a 2-d array, got shape", lambda: Dense(x)),
    "matrix as a diagonal": (
        ValueError,
        "Diagonal expects a 1-d array",
        lambda: Diagonal(entries(2, 2)),
    ),
    "sparse matrix as dense": (TypeError, "Dense expects a dense array", lambda: Dense(sparse)),
    "claim of symmetry": (
        ValueError,
        "differs from its transpose",
        lambda: Dense(entries(3, 3), symmetric=True),
    ),
    "symmetric rectangle": (
        ValueError,
        r"a symmetric FromFunction is square, got shape \(3, 4\)",
        lambda: FromFunction(lambda V: V, (3, 4), symmetric=True),
    ),
    "identity like a rectangle": (
        ValueError,
        "expects a square operator",
        lambda: Identity.like(A),
    ),
    "low rank of two ranks": (
        ValueError,
        r"expects U \(m, r\), s \(r,\), W \(n, r\)",
        lambda: LowRank(entries(4, 2), entries(3)),
    ),
    "low rank of two dtypes": (
        TypeError,
        "one dtype and device, got U",
        lambda: LowRank(entries(4, 2), entries(2).float()),
    ),
    "damping of a rectangle": (
        ValueError,
        "Damped expects a square operator",
        lambda: Damped(A, 1.0),
    ),
    "damping of the wrong length": (
        ValueError,
        r"expected a number, shape \(4,\) or a mapping",
        lambda: Damped(S, torch.ones(3)),
    ),
    "complex damping": (TypeError, "expects real numbers", lambda: Damped(S, 1j)),
    "no damping": (TypeError, "expects real numbers, got None", lambda: Damped(S, None)),
    "damping that is no number": (
        ValueError,
        "expected finite numbers, got nan",
        lambda: Damped(S, float("nan")),
    ),
    "the identity like a tensor": (
        TypeError,
        "Identity.like expects an operator of hvpop, got Tensor",
        lambda: Identity.like(entries(4)),  # type: ignore[arg-type]
    ),
    "a vector of another layout": (
        ValueError,
        r"layout of 4 entries expects shape \(\.\.\., 4\), got \(3,\)",
        lambda: Layout(("a",), (torch.Size([4]),)).unflatten(entries(3)),
    ),
    "damping by name without names": (
        TypeError,
        r"has no named parameters; .* shape \(4,\)",
        lambda: Damped(S, {"a": 1.0}),
    ),
    "damping by an unknown name": (
        ValueError,
        "no parameter matches head.*; it has net.weight, net.bias, scale",
        lambda: Damped(NamedDense(entries(4, 4)), {"net.*": 1.0, "head.*": 2.0}),
    ),
    "damping of a tensor": (
        TypeError,
        r"Damped expects operators of hvpop, got Tensor; wrap a matrix in hvpop.Dense\(matrix\)",
        lambda: Damped(entries(4, 4), 1.0),  # type: ignore[arg-type]
    ),
    "blocks that are no operators": (
        TypeError,
        "BlockDiagonal expects operators of hvpop, got ndarray",
        lambda: BlockDiagonal([np.eye(2)]),  # type: ignore[list-item]
    ),
    "the identity of an operator": (
        ValueError,
        r"Identity expects its order, .* got <4x4 Dense.*; Identity.like\(A\)",
        lambda: Identity(S),  # type: ignore[arg-type]
    ),
    "a mask as indices": (
        TypeError,
        r"Restriction expects integers, got torch.bool; .* mask.nonzero\(\)",
        lambda: Restriction(x > 0, 4),
    ),
    "an array to a layout": (
        TypeError,
        "unflatten expects a tensor, got ndarray; use torch.as_tensor",
        lambda: Layout(("a",), (torch.Size([4]),)).unflatten(x.numpy()),  # type: ignore[arg-type]
    ),
    "a hook that returns an array": (
        ValueError,
        r"its product must have shape \(4, 1\), got ndarray",
        lambda: InNumPy((4, 4), dtype=F64, device="cpu") @ x,
    ),
    "damping by a name without its glob": (
        ValueError,
        r"no parameter matches net; did you mean net\.\*\?",
        lambda: Damped(NamedDense(entries(4, 4)), {"net": 1.0}),
    ),
    "damping by a name misspelt": (
        ValueError,
        r"no parameter matches net\.wieght; did you mean net\.weight\?",
        lambda: Damped(NamedDense(entries(4, 4)), {"net.wieght": 1.0}),
    ),
    "damping by name with entries": (
        TypeError,
        r"expected one number for 'net\.\*', got Tensor; .* in one vector",
        lambda: Damped(NamedDense(entries(4, 4)), {"net.*": entries(2)}),  # type: ignore[dict-item]
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_in_words_that_help(mistake: str) -> None:
    error, words, do = REFUSED[mistake]
    with pytest.raises(error, match=words):
        do()
