"""The algebra: how it prints, what its structure shows, what a subclass must and may do."""

from __future__ import annotations

import copy
import fractions
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hvpop import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    FromFunction,
    Identity,
    LinearOperator,
    LowRank,
)

from .registry import (
    BF16,
    F64,
    LevenbergMarquardt,
    LiveDense,
    dense,
    entries,
    symmetric,
)

A, S = dense(3, 4)[0], symmetric(4)[0]  # general and symmetric
x = entries(4)


# -- text -----------------------------------------------------------------------------------------


def test_repr_tells_shape_kind_dtype_and_device() -> None:
    assert repr(A) == "<3x4 Dense float64 cpu>"
    assert repr(2 * A) == "<3x4 Scaled(2) float64 cpu>"
    assert repr(Identity(5, dtype=BF16, device="meta")) == "<5x5 Identity bfloat16 meta>"
    assert repr(LowRank(entries(4, 2))) == "<4x4 LowRank(2) float64 cpu>"
    assert repr(S**3) == "<4x4 Power(3) float64 cpu>"


def test_print_shows_the_tree() -> None:
    P = LowRank(entries(4, 2))
    tree = P @ (S + 0.1 * Identity(4)) @ P + Damped(S, 1.0)
    assert str(tree).splitlines() == [
        "<4x4 Sum float64 cpu>",
        "├─ <4x4 Product float64 cpu>",
        "│  ├─ <4x4 LowRank(2) float64 cpu>",
        "│  ├─ <4x4 Sum float64 cpu>",
        "│  │  ├─ <4x4 Dense float64 cpu>",
        "│  │  └─ <4x4 Scaled(0.1) float64 cpu>",
        "│  │     └─ <4x4 Identity float64 cpu>",
        "│  └─ <4x4 LowRank(2) float64 cpu>",
        "└─ <4x4 Damped float64 cpu>",
        "   └─ <4x4 Dense float64 cpu>",
    ]


def test_a_low_rank_operator_of_one_factor_is_symmetric() -> None:
    U, s = entries(4, 2), torch.ones(2, dtype=torch.float64)
    assert LowRank(U, s, U).symmetric
    assert LowRank(U, s, U.clone()).symmetric  # W equals U
    assert not LowRank(U, s, U + 1e-12).symmetric


def test_an_operator_without_parts_prints_as_its_repr() -> None:
    assert str(A) == repr(A)


# -- structure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (S + S, True),
        (A.T @ A, True),
        (A @ S @ A.T, True),
        ((2 * A).T, False),
        (S @ S, True),
        (S @ Identity(4), False),
        (A.T @ Dense(entries(3, 3)) @ A, False),
        (S + A.T @ A, True),
        (3 * S**2, True),
        (Damped(S, 1.0), True),
        (BlockDiagonal([S, S]), True),
        (BlockDiagonal([S, A]), False),
        (S + Dense(entries(4, 4)), False),
    ],
    ids=repr,
)
def test_symmetry_is_seen_where_the_structure_shows_it(
    operator: LinearOperator, expected: bool
) -> None:
    assert operator.symmetric is expected


def test_transposes_cancel() -> None:
    assert S.T is S
    assert S.H is S
    assert A.T.T is A
    assert A.T.H is A


def test_sums_and_products_are_flat() -> None:
    assert len((S + S + (S + S)).parts) == 4
    assert len((S @ (S @ S) @ S).parts) == 4


def test_to_dense_multiplies_in_blocks_that_fit_together() -> None:
    d = entries(300)
    assert torch.equal(Diagonal(d).to_dense(), d.diag())
    assert torch.equal(Dense(entries(2, 300)).to_dense(), entries(2, 300))


def test_sum_adds_operators() -> None:
    assert torch.equal(sum([S, S, S]) @ x, S @ x + S @ x + S @ x)


def test_a_product_with_any_kind_of_scalar_is_a_multiple() -> None:
    expected = 2 * (S @ x)
    two: list[Any] = [2, 2.0, np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2)]
    for scalar in [*two, fractions.Fraction(2)]:
        assert torch.equal((scalar * S) @ x, expected)
        assert torch.equal((S * scalar) @ x, expected)
        assert torch.equal((S / (1 / scalar)) @ x, expected)
    assert torch.equal(S.dot(2.0) @ x, expected)
    assert torch.equal((S ** np.int64(2)) @ x, S @ (S @ x))


def test_arrays_tensors_and_lists_multiply_from_the_left() -> None:
    u, U = entries(3), entries(2, 3)
    M = A.to_dense()
    assert torch.allclose(u @ A, u @ M, atol=1e-14)
    assert torch.allclose(U @ A, U @ M, atol=1e-14)
    assert np.allclose(u.numpy() @ A, u @ M, atol=1e-14)
    assert np.allclose(U.numpy() @ A, U @ M, atol=1e-14)
    assert np.allclose(U.tolist() @ A, U @ M, atol=1e-14)
    assert isinstance(u @ A, Tensor)
    assert isinstance(u.numpy() @ A, np.ndarray)


def test_linearizing_keeps_shared_parts_shared_and_the_rest() -> None:
    live = LiveDense(entries(4, 4))
    shared = Damped(live, 0.1)
    frozen = (live + shared + 2 * shared + S).linearize()
    leaf, damped, scaled, untouched = frozen.parts
    assert type(leaf) is Dense
    assert damped.parts[0] is leaf
    assert scaled.parts[0] is damped
    assert untouched is S
    assert type(shared.operator) is LiveDense


def test_linearizing_what_has_nothing_to_prepare_returns_it() -> None:
    composite = 2 * (S + S)
    assert composite.linearize() is composite
    assert S.linearize(memory="1GiB") is S


def test_operators_can_be_pickled_and_copied() -> None:
    for operator in (
        A,
        A.T,
        S + S,
        Damped(S, x),
        LevenbergMarquardt(S, 0.1),
        BlockDiagonal([A, S]),
    ):
        for again in (pickle.loads(pickle.dumps(operator)), copy.deepcopy(operator)):
            assert torch.equal(again.to_dense(), operator.to_dense())


def test_threads_may_share_an_operator() -> None:
    operator = Damped(2 * S @ S + Identity(4), x)
    expected, found = operator.to_dense(), list[bool]()
    threads = [
        threading.Thread(
            target=lambda: found.append(
                all(torch.equal(operator.to_dense(), expected) for _ in range(50))
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_a_default_device_of_torch_does_not_matter() -> None:
    expected = Damped(S, 0.1).to_dense()
    with torch.device("meta"):
        assert torch.equal(Damped(S, 0.1).to_dense(), expected)
        assert np.array_equal(S @ x.numpy(), (S @ x).numpy())


# -- what a subclass must and may do --------------------------------------------------------------


class Doubling(LinearOperator):
    """The least that a subclass can be."""

    def _apply(self, V: Tensor) -> Tensor:
        return 2 * V


def test_a_subclass_without_a_transpose_multiplies_and_says_what_it_lacks() -> None:
    D = Doubling((3, 3), dtype=F64, device="cpu")
    assert (D @ np.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises(NotImplementedError, match="no transpose: implement _apply_transpose"):
        (D + D).T @ np.ones(3)
    assert Doubling((3, 3), dtype=F64, device="cpu", symmetric=True).T @ np.ones(3) is not None


def test_a_subclass_without_a_product_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Bare does not implement _apply"):
        type("Bare", (LinearOperator,), {})((3, 3), dtype=F64, device="cpu") @ np.ones(3)


def test_a_hook_may_return_its_operand_a_view_of_it_or_an_expanded_tensor() -> None:
    for function in (
        lambda V: V,
        lambda V: V.flip(0).flip(0),
        lambda V: V[:1].expand(4, -1),
        lambda V: V.T.contiguous().T,
    ):
        operator = FromFunction(function, (4, 4), symmetric=True)
        v = x.clone()
        result = operator @ v
        result += 1.0
        assert torch.equal(v, x)


def test_a_hook_that_builds_a_graph_gives_plain_results() -> None:
    weight = torch.nn.Parameter(entries(4, 4))
    operator = FromFunction(lambda V: weight @ V, (4, 4))
    assert not (operator @ x).requires_grad
    assert np.allclose(operator @ x.numpy(), (weight @ x).detach(), atol=1e-14)


def test_a_result_has_the_dtype_of_the_operator_whatever_its_hook_returns() -> None:
    operator = FromFunction(lambda V: V.float(), (4, 4), symmetric=True)
    assert (operator @ x.numpy()).dtype == np.float64
    assert (operator @ x).dtype is F64


@pytest.mark.parametrize("returned", [lambda V: V[:2], lambda V: None, lambda V: V.numpy()])
def test_a_function_that_returns_the_wrong_thing_is_named(returned: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"FromFunction .*must return a tensor \(4, 1\), got"):
        FromFunction(returned, (4, 4)) @ x


def test_a_subclass_whose_product_has_the_wrong_shape_is_named() -> None:
    class Wrong(LinearOperator):
        def _apply(self, V: Tensor) -> Tensor:
            return V[:2]

    with pytest.raises(ValueError, match=r"Wrong .* must have shape \(3, 1\), got \(2, 1\)"):
        Wrong((3, 3), dtype=F64, device="cpu") @ np.ones(3)


def test_batches_of_vectors_along_the_first_axes_as_scipy_may_pass_them() -> None:
    M = A.to_dense().numpy()
    V, U = entries(2, 5, 4).numpy(), entries(2, 5, 3).numpy()
    assert np.allclose(A._matvec(V), V @ M.T, atol=1e-13)
    assert np.allclose(A._rmatvec(U), U @ M, atol=1e-13)
    assert A._matvec(V[0, 0]).shape == (3,)
    assert A._matvec(V[0, :1].T).shape == (3, 1)
    with pytest.raises(ValueError, match=r"expects shape \(4, k\)"):
        A._matvec(U)


class Cached(LinearOperator):
    """An operator of a user's that keeps what it returns."""

    def __init__(self, n: int) -> None:
        super().__init__((n, n), dtype=torch.float64, device="cpu", symmetric=True)
        self.kept: Tensor | None = None

    def _apply(self, V: Tensor) -> Tensor:
        if self.kept is None or self.kept.shape != V.shape:
            self.kept = 2 * V
        return self.kept


class CachedDiagonal(Diagonal):
    """The same as a subclass of an operator whose products are new memory."""

    kept: Tensor | None = None

    def _apply(self, V: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = super()._apply(V)
        return self.kept


@pytest.mark.parametrize("kind", ["class", "subclass", "function"])
def test_no_sum_is_gathered_in_what_a_users_operator_keeps(kind: str) -> None:
    n, twos = 3, torch.full((3,), 2.0, dtype=torch.float64)
    kept: list[Tensor] = []

    def product(V: Tensor) -> Tensor:
        kept[:] = kept or [2 * V]
        return kept[0]

    def made() -> LinearOperator:
        if kind == "function":
            return FromFunction(product, (n, n), dtype=torch.float64, symmetric=True)
        return Cached(n) if kind == "class" else CachedDiagonal(twos)

    v = torch.arange(1.0, 4.0, dtype=torch.float64)
    for around in (
        lambda A: A + 0.5 * Identity.like(A),
        lambda A: A + Diagonal(0.5 * torch.ones(n, dtype=torch.float64)),
        lambda A: Damped(A, 0.5),
        lambda A: Damped(A + 0.25 * Identity.like(A), 0.25),
    ):
        kept.clear()
        B = around(made())
        for _ in range(3):
            torch.testing.assert_close(B @ v, 2.5 * v, rtol=1e-15, atol=0)
