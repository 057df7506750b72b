"""The laws that every operator obeys, for tests of operators of one's own: one call checks them all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .operators import Dense, LinearOperator, arguments
from .operators.crossing import working_dtype

__all__ = ["check_operator"]


@dataclass(frozen=True)
class Draw:
    """What a law is tried with: the same draw gives the same numbers."""

    seed: int = 0
    columns: int = 2
    scale: float = 1.0
    a: float = 1.5
    b: float = -2.25
    in_torch: bool = True


@dataclass(frozen=True)
class Subject:
    """An operator under test, and its matrix in float64 where that is known by other means."""

    A: LinearOperator
    matrix: Tensor | None = None  # (m, n)

    def operands(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Columns for ``A``, ``(n, k)``, and for its transpose, ``(m, k)``."""
        (m, n), dtype = self.A.shape, working_dtype(self.A.torch_dtype)
        pair = [
            draw.scale * normal(size, draw.columns, seed=draw.seed + shift)
            for size, shift in ((n, 0), (m, 1000))
        ]
        return pair[0].to(self.A.device, dtype), pair[1].to(self.A.device, dtype)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm, of some products where the matrix is not known."""
        if self.matrix is not None:
            return float(self.matrix.double().norm())
        V = self.operands(Draw(seed=77, columns=4))[0]
        return float((self.A @ V).double().norm())  # twice what is expected

    @cached_property
    def transposes(self) -> bool:
        """Whether there are products with the transpose, which an operator may do without."""
        try:
            self.A.rmatmat(self.operands(Draw(columns=1))[1])
        except NotImplementedError:
            return False
        return True

    def size(self, *operands: Tensor) -> float:
        """A bound of the numbers that are added up in a product with each of these."""
        size = 1.0
        for V in operands:
            size *= (1 + self.norm) * (1 + float(V.double().norm()))
        return size

    def close(self, found: Tensor, expected: Tensor, size: float) -> None:
        """Equal to rounding: ``size`` bounds the numbers that were added up on the way.

        A product of operators of order n rounds each entry about n times per factor, in blocks where
        n is large; 64 leaves room for the few factors of a composite, and for the functions inside a
        Hessian.
        """
        info = torch.finfo(working_dtype(self.A.torch_dtype))
        allowed = 64 * min(max(1, *self.A.shape), 1000) * info.eps * size + info.tiny
        assert found.shape == expected.shape, (
            f"shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
        gap = float((found.double() - expected.double()).norm())
        assert gap <= allowed, f"they differ by {gap:.2e}, where rounding allows {allowed:.2e}"


Law = Callable[[Subject, Draw], None]


def check_operator(A: LinearOperator, matrix: Tensor | None = None, *, seed: int = 0) -> None:
    """Hold an operator to the laws of `LinearOperator`, which SciPy's and hvpop's solvers count on.

    Parameters
    ----------
    A : LinearOperator
        Of one's own: a subclass, a strategy inside a `HessianOperator`, an expression.
    matrix : Tensor, optional
        ``(m, n)``, what it should be, known by other means. Without it the operator is held against
        itself: linear, adjoint to its transpose, symmetric if it says so, the same for columns and
        blocks, for NumPy and torch, at every call; operands neither written nor kept; no mode of torch
        changes a product.
    seed : int
        Of the vectors.

    Raises
    ------
    AssertionError
        Names each law that is broken, and by how much.

    Notes
    -----
    Tolerances come from the eps of the dtype, the order and the norm. Cost: some hundred products;
    operators of more than 256 columns are not written out.

    Examples
    --------
    >>> import torch
    >>> from hvpop import LinearOperator
    >>> from hvpop.testing import check_operator
    >>> class Twice(LinearOperator):
    ...     def _apply(self, V):
    ...         return V.mul_(2)  # writes to its operand
    >>> check_operator(Twice((3, 3), dtype=torch.float64, device="cpu", symmetric=True))
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: <3x3 Twice float64 cpu> breaks ...
    """
    arguments.operator("check_operator", A)
    subject = Subject(A, None if matrix is None else matrix.double())
    draws = [
        Draw(seed, 3), Draw(seed + 1, 1, 1e4, 0.5, 3.0, False), Draw(seed + 2, 2, 1e-4),
        Draw(seed + 3, 1, 0.0),
    ]  # fmt: skip
    broken = []
    for name, law in LAWS.items():
        try:
            for draw in draws if name in DRAWN else draws[:1]:
                law(subject, draw)
        except AssertionError as error:
            broken.append(
                f"{name}: {str(error).splitlines()[0] if str(error) else 'it does not hold'}"
            )
        except Exception as error:
            broken.append(f"{name}: {type(error).__name__}: {error}")
    if broken:
        raise AssertionError(f"{A!r} breaks " + "; ".join(broken))


# -- the laws -------------------------------------------------------------------------------------


def products_are_linear(s: Subject, draw: Draw) -> None:
    A, (V, _) = s.A, s.operands(draw)
    W = normal(*V.shape).to(V)
    size = 4 * (s.size(V) + s.size(W))
    s.close(A @ (draw.a * V + draw.b * W), draw.a * (A @ V) + draw.b * (A @ W), size)


def a_product_is_that_of_the_matrix(s: Subject, draw: Draw) -> None:
    if s.matrix is None:
        return
    A, (V, U) = s.A, s.operands(draw)
    matrix = s.matrix.to(A.device)
    s.close(A @ V, matrix @ V.double(), s.size(V))
    if s.transposes:
        s.close(A.rmatmat(U), matrix.T @ U.double(), s.size(U))
        s.close(U.T @ A, U.T.double() @ matrix, s.size(U))


def the_transpose_is_the_adjoint(s: Subject, draw: Draw) -> None:
    if not s.transposes:
        return
    A, (V, U) = s.A, s.operands(draw)
    s.close(U.T @ (A @ V), (A.T @ U).T @ V, s.size(V, U))
    # not to the bit: BLAS rounds by how its operands lie in memory
    s.close(A.T @ U, A.rmatmat(U), s.size(U))
    s.close(A.H @ U, A.rmatmat(U), s.size(U))
    s.close(A.T.T @ V, A @ V, s.size(V))


def what_calls_itself_symmetric_is(s: Subject, draw: Draw) -> None:
    if not s.A.symmetric:
        return
    assert s.A.T.symmetric
    V, U = s.operands(draw)
    s.close(U.T @ (s.A @ V), (s.A @ U).T @ V, s.size(V, U))
    if s.matrix is not None:
        s.close(s.matrix, s.matrix.T, s.size(s.matrix))


def a_block_product_is_its_column_products(s: Subject, draw: Draw) -> None:
    A, (V, U) = s.A, s.operands(draw)
    for X, matmat, matvec in ((V, A.matmat, A.matvec), (U, A.rmatmat, A.rmatvec)):
        if X is U and not s.transposes:
            continue
        one_by_one = torch.stack([matvec(x) for x in X.T], dim=1)
        s.close(matmat(X), one_by_one, s.size(X))
        assert matvec(X[:, :1]).shape == one_by_one[:, :1].shape


def numpy_and_torch_agree(s: Subject, draw: Draw) -> None:
    A, (V, U) = s.A, s.operands(draw)
    pairs = [(A.matmat, V), (A.matvec, V[:, 0]), (A.dot, V)]
    if s.transposes:
        pairs += [(A.rmatmat, U), (A.rmatvec, U[:, :1])]
    for product, operand in pairs:
        in_numpy, in_torch = product(operand.cpu().numpy()), product(operand)
        assert isinstance(in_numpy, np.ndarray)
        assert in_numpy.dtype == A.dtype
        assert in_torch.dtype == operand.dtype
        s.close(torch.from_numpy(in_numpy), in_torch.cpu(), s.size(operand))


def operands_are_neither_written_nor_kept(s: Subject, draw: Draw) -> None:
    pairs = zip(s.operands(draw), (s.A.matmat, s.A.rmatmat), strict=True)
    for X, product in list(pairs)[: 2 if s.transposes else 1]:
        operand: Any = X.clone() if draw.in_torch else X.cpu().numpy().copy()
        result = product(operand)
        assert bool((torch.as_tensor(operand).to(X) == X).all()), "the operand was written to"
        kept = copy.deepcopy(result)
        operand[...] = 77.0  # solvers reuse their buffers
        assert bool((result == kept).all()), "the result is a view of the operand"
        result[...] = 55.0
        again = torch.as_tensor(product(X if draw.in_torch else X.cpu().numpy()))
        s.close(again, torch.as_tensor(kept), s.size(X))


def a_sum_adds_products(s: Subject, draw: Draw) -> None:
    A, (V, U) = s.A, s.operands(draw)
    if A.shape[0] * A.shape[1] > _SMALL**2:
        return
    B = Dense(normal(*A.shape, seed=9).to(A.device, A.torch_dtype))
    size = s.size(V) + s.size(U) + 8.0 * float(V.norm() + U.norm())
    s.close((A + B) @ V, A @ V + B @ V, size)
    if s.transposes:
        s.close((A - B).T @ U, A.T @ U - B.T @ U, size)


def a_multiple_multiplies_products(s: Subject, draw: Draw) -> None:
    A, (V, _) = s.A, s.operands(draw)
    assert torch.equal((A * draw.a) @ V, draw.a * (A @ V))
    left: Any = draw.a * A
    assert torch.equal(left @ V, draw.a * (A @ V))
    assert torch.equal(-A @ V, -(A @ V))


def a_product_transposes_in_reverse(s: Subject, draw: Draw) -> None:
    if not s.transposes:
        return
    A, (_, U) = s.A, s.operands(draw)
    B = Dense(normal(A.shape[1], 3, seed=9).to(A.device, A.torch_dtype))
    size = 8 * s.size(U)
    s.close((A @ B).T @ U, B.T @ (A.T @ U), size)
    s.close((A @ B).T @ U, (B.T @ A.T) @ U, size)
    if s.matrix is not None:
        s.close((B.T @ A.T).to_dense(), B.matrix.double().T @ s.matrix.to(A.device).T, size)


def complex_columns_multiply_by_their_parts(s: Subject, draw: Draw) -> None:
    A, X = s.A, s.operands(draw)[0]
    Y = normal(*X.shape).to(X)
    product = A @ (X.cpu().numpy() + 1j * Y.cpu().numpy())
    s.close(torch.from_numpy(product.real.copy()), (A @ X).cpu(), s.size(X))
    s.close(torch.from_numpy(product.imag.copy()), (A @ Y).cpu(), s.size(Y))


def the_forms_of_batches_average_to_that_of_the_matrix(s: Subject, draw: Draw) -> None:
    A, (V, _) = s.A, s.operands(draw)
    forms = A.batch_forms(V) if A.shape[0] == A.shape[1] else None
    if forms is None:
        return
    expected = (V.double() * (A @ V).double()).sum(0).cpu()
    s.close(forms.average(), expected, s.size(V) * float(1 + V.norm()))
    assert forms.values.shape == (*forms.weights.shape, V.shape[1])
    assert forms.values.dtype is forms.weights.dtype is torch.float64
    assert forms.standard_error().shape == (V.shape[1],)


def products_repeat_to_the_last_bit(s: Subject, draw: Draw) -> None:
    V = s.operands(draw)[0]
    assert torch.equal(s.A @ V, s.A @ V)


def no_columns_give_no_columns(s: Subject, draw: Draw) -> None:
    A, (m, n) = s.A, s.A.shape
    empty = torch.zeros(n, 0, dtype=A.torch_dtype, device=A.device)
    assert (A @ empty).shape == (m, 0)
    assert (A @ empty).dtype is A.torch_dtype
    assert (A @ np.zeros((n, 0))).shape == (m, 0)
    if s.transposes:
        assert (A.T @ np.zeros((m, 0))).shape == (n, 0)


def to_dense_is_the_matrix(s: Subject, draw: Draw) -> None:
    A = s.A
    if A.shape[1] > _SMALL:
        return
    found, V = A.to_dense(), s.operands(draw)[0]
    assert found.dtype is working_dtype(A.torch_dtype)
    s.close(found.double() @ V.double(), A @ V, s.size(V))
    if s.matrix is not None:
        s.close(found, s.matrix.to(A.device), s.size(s.matrix))
        if s.transposes:
            s.close(A.T.to_dense(), s.matrix.to(A.device).T, s.size(s.matrix))


def linearizing_keeps_the_matrix(s: Subject, draw: Draw) -> None:
    A, (V, _) = s.A, s.operands(draw)
    frozen = A.linearize()
    assert frozen.shape == A.shape
    assert frozen.torch_dtype is A.torch_dtype
    assert frozen.symmetric == A.symmetric
    assert frozen.is_current()
    s.close(frozen @ V, A @ V, s.size(V))
    if s.matrix is not None:
        s.close(frozen.to_dense(), s.matrix.to(A.device), s.size(s.matrix))


def no_mode_of_torch_changes_a_product(s: Subject, draw: Draw) -> None:
    A, (V, _) = s.A, s.operands(draw)
    expected = A @ V
    for mode in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.enable_grad(),
        torch.autocast(A.device.type, dtype=torch.bfloat16),
    ):
        with mode:
            assert torch.equal(A @ V, expected), f"{type(mode).__name__} does"
    with torch.inference_mode():
        made_there = V.clone()
    assert torch.equal(A @ made_there, expected), "an operand made in inference mode does"


def results_are_plain_contiguous_tensors_without_a_graph(s: Subject, draw: Draw) -> None:
    V = s.operands(draw)[0].requires_grad_()
    result = s.A @ V
    assert not result.requires_grad
    assert result.is_contiguous()
    assert V.grad is None


_SMALL = 256  # columns up to which a matrix is written out


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal entries in float64, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


_OF_DRAWS: tuple[Law, ...] = (
    a_product_is_that_of_the_matrix,
    products_are_linear,
    the_transpose_is_the_adjoint,
    a_block_product_is_its_column_products,
    numpy_and_torch_agree,
    operands_are_neither_written_nor_kept,
    a_sum_adds_products,
    a_multiple_multiplies_products,
    a_product_transposes_in_reverse,
    complex_columns_multiply_by_their_parts,
    the_forms_of_batches_average_to_that_of_the_matrix,
)
_OF_ONE: tuple[Law, ...] = (
    what_calls_itself_symmetric_is,
    products_repeat_to_the_last_bit,
    no_columns_give_no_columns,
    to_dense_is_the_matrix,
    linearizing_keeps_the_matrix,
    no_mode_of_torch_changes_a_product,
    results_are_plain_contiguous_tensors_without_a_graph,
)
LAWS: dict[str, Law] = {law.__name__.replace("_", " "): law for law in (*_OF_DRAWS, *_OF_ONE)}
DRAWN = frozenset(law.__name__.replace("_", " ") for law in _OF_DRAWS)
