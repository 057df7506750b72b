"""Sums over n are right to the vectors' own precision at any n, and are made in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hvpop.operators import Space

F32 = 2.0**-23
FOLDERS = ("solvers", "spectrum")
ROOT = Path(__file__).parents[2] / "hvpop"


def space(n: int, dtype: torch.dtype = torch.float32) -> Space:
    return Space(n, dtype, torch.device("cpu"))


def normal(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, generator=generator).T


# BLAS adds up 2^15 products of float32 numbers in lanes of 16 at least, and rounds each time.
SHORT = (1 << 11) * F32 / 2


@pytest.mark.parametrize("n", [1, 5, 1024, 70_001, 1_000_003])
def test_inner_products_are_right_to_the_precision_of_the_vectors(n: int) -> None:
    X, Y = normal(n, 3).abs_(), normal(n, 3, seed=1)
    S, exact = space(n), X.double().T @ Y.double()
    sizes = X.double().T @ Y.double().abs()
    assert ((S.inner(X, Y) - exact).abs() <= n * 2.0**-52 * sizes).all()
    assert ((S.inner(X, Y[:, :1]) - exact[:, :1]).abs() <= SHORT * sizes[:, :1]).all()
    assert ((S.inner(X[:, :1], Y) - exact[:1]).abs() <= SHORT * sizes[:1]).all()
    assert ((S.dots(X, Y) - exact.diagonal()).abs() <= SHORT * sizes.diagonal()).all()
    torch.testing.assert_close(S.norms(X), X.double().norm(dim=0), rtol=SHORT, atol=0)
    assert torch.equal(S.largest(Y), Y.abs().amax(0))


@pytest.mark.parametrize("n", [5, 1_000_003])
@pytest.mark.parametrize("k", [1, 3])
def test_one_pass_updates_vectors_and_sums_what_they_have_become(n: int, k: int) -> None:
    X, Y = normal(n, k), normal(n, k, seed=1)
    expected = X + Y
    sums = space(n).together((X, X), (X, Y), first=lambda part: X[part].add_(Y[part]))
    assert torch.equal(X, expected)
    for total, other in zip(sums, (X, Y), strict=True):
        exact = X.double().mul(other).sum(0)
        sizes = X.double().abs().mul(other.abs()).sum(0)
        assert ((total - exact).abs() <= SHORT * sizes).all()


def test_the_square_of_a_constant_is_right_where_plain_float32_is_not() -> None:
    n = 4_000_000
    x = torch.full((n, 1), 0.1)
    exact = n * float(x[0, 0]) ** 2
    both = torch.cat([x, x], 1)
    for total in (space(n).dots(x, x), space(n).norms(x) ** 2, space(n).inner(both, x)):
        assert ((total / exact - 1).abs() <= SHORT).all()  # all round alike


def test_sums_of_any_numbers_are_right_to_less_than_a_rounding() -> None:
    x = normal(4_000_000, 1)
    exact = x.double().square().sum(0)
    assert abs(float(space(4_000_000).dots(x, x) / exact) - 1) < F32


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_do_not_over_or_underflow(scale: float) -> None:
    x = torch.full((100, 1), scale)
    assert abs(float(space(100).norms(x)) / (10 * float(x[0, 0])) - 1) < 1e-12
    x = torch.full((200_000, 1), scale)
    assert abs(float(space(200_000).norms(x)) / (200_000**0.5 * float(x[0, 0])) - 1) < F32
    assert (
        abs(float(space(200_000).inner(torch.cat([x, x], 1), x)[1, 0]) / float(x[0, 0]) ** 2 - 2e5)
        < 1
    )
    y = torch.full((100, 1), scale**6, dtype=torch.float64)
    assert abs(float(space(100, torch.float64).norms(y)) / (10 * scale**6) - 1) < 1e-12


def independent(n: int) -> Tensor:
    return normal(n, 5)


def dependent(n: int) -> Tensor:
    X = normal(n, 5)
    X[:, 3], X[:, 4] = X[:, 2], 0.0
    return X


@pytest.mark.parametrize("made", [independent, dependent])
@pytest.mark.parametrize("n", [5, 63, 200, 100_003])
def test_qr_is_orthonormal_to_rounding_whatever_the_columns(made: object, n: int) -> None:
    X = made(n)  # type: ignore[operator]
    Q, R = space(n).qr(X)
    eye = torch.eye(5, dtype=torch.float64)
    assert (
        (Q.double().T @ Q.double() - eye).abs() <= 4 * F32
    ).all()  # each entry rounds by half eps
    assert ((Q.double() @ R - X).abs() <= 5 * F32 * X.double().norm(dim=0)).all()
    assert torch.equal(R, R.triu())
    assert (R.diagonal() >= 0).all()


FORBIDDEN = {"vector_norm", "matrix_norm", "vecdot", "qr", "norm", "dot", "vdot", "inner", "einsum"}


def reductions(source: str) -> list[str]:
    """Calls of torch, or of tensors, that sum over the first dimension."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        of_space = owner.split(".")[-1] in ("space", "checks") or owner.startswith("Space")
        if node.func.attr in FORBIDDEN and not of_space:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "path", [p for folder in FOLDERS for p in (ROOT / folder).glob("*.py")], ids=lambda p: p.name
)
def test_nothing_sums_over_n_beside_the_space(path: Path) -> None:
    assert reductions(path.read_text(encoding="utf-8")) == []
