"""Sums over n are right to the vectors' own precision at any n, and are made in one place."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvpop import FromFunction, Identity, LinearOperator, solvers, spectrum
from hvpop.operators import Space

F32 = 2.0**-23


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


ORDER = 1009  # a prime that nothing else is as long as
OUTSIDE = ("operators/space.py", "operators/crossing.py", __file__)


class Watched(TorchDispatchMode):
    """Notes where a dimension of `ORDER` goes into an operation of torch and none comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        after = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        summed = any(ORDER in t.shape for t in before) and not any(ORDER in t.shape for t in after)
        names = {
            "select",
            "slice",
            "detach",
            "cat",
            "is_pinned",
            "_to_copy",
            "new_ones",
            "new_zeros",
            "new_full",
            "new_empty",
        }
        if summed and func.overloadpacket.__name__ not in names:
            frames = [frame.filename for frame in traceback.extract_stack()]
            own = [name for name in frames if "hvpop" in name and "tests" not in name]
            if own and not own[-1].endswith(OUTSIDE):
                self.found.add(f"{Path(own[-1]).name}: {func.overloadpacket.__name__}")
        return result


def positive() -> LinearOperator:
    d = torch.linspace(0.5, 3.0, ORDER)
    return FromFunction(
        lambda V: d[:, None] * V, (ORDER, ORDER), lambda U: d[:, None] * U, dtype=torch.float32,
        symmetric=True,
    )  # fmt: skip


RIGHT = normal(ORDER, 3)
NATIVE: dict[str, Callable[[LinearOperator], object]] = {
    "cg": lambda A: solvers.cg(A, RIGHT),
    "cg by M": lambda A: solvers.cg(A, RIGHT, preconditioner=Identity.like(A)),
    "minres": lambda A: solvers.minres(A, RIGHT, x0=RIGHT),
    "block_cg": lambda A: solvers.block_cg(A, RIGHT),
    "lsmr": lambda A: solvers.lsmr(A, RIGHT, damping=0.1),
    "multishift": lambda A: solvers.multishift_cg(A, RIGHT, [0.1, 1.0]),
    "steihaug": lambda A: solvers.steihaug(A, RIGHT[:, 0], 1.0),
    "nystrom": lambda A: solvers.nystrom(A, 5, 0.1),
    "function": lambda A: solvers.matrix_function(A, torch.exp, rtol=1e-3) @ RIGHT,
    "eigsh": lambda A: spectrum.eigsh(A, 2, basis=12, max_products=40),
    "eigsh from": lambda A: spectrum.eigsh(
        A, 2, block=2, v0=RIGHT, deflate=RIGHT[:, :1], max_products=40
    ),
    "hutchinson": lambda A: spectrum.trace(A, method="hutchinson", max_products=40),
    "hutch++": lambda A: spectrum.trace(A, method="hutch++", max_products=40),
    "xtrace": lambda A: spectrum.trace(A, method="xtrace", max_products=40),
    "diagonal": lambda A: spectrum.diagonal(A, max_products=40),
    "density": lambda A: spectrum.spectral_density(A, steps=8, max_products=40),
    "logdet": lambda A: spectrum.logdet(A, max_products=40),
    "norms": lambda A: (spectrum.frobenius_norm(A), spectrum.spectral_norm(A)),
}


@pytest.mark.parametrize("name", NATIVE)
def test_nothing_sums_over_n_beside_the_space(name: str) -> None:
    A = positive()
    with Watched() as watched:
        NATIVE[name](A)
    assert watched.found == set()


def test_a_product_of_transposes_would_be_seen() -> None:
    module = {"__file__": "hvpop/solvers/made_up.py"}
    exec(compile("def gram(X): return X.T @ X", "hvpop/solvers/made_up.py", "exec"), module)
    with Watched() as watched:
        module["gram"](RIGHT)  # type: ignore[operator]
    assert watched.found == {"made_up.py: mm"}
