"""Operators of any size, seeds of any kind, products that are not finite, and no more products than n."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hvpop import Damped, Dense, Diagonal, Identity
from hvpop.spectrum import diagonal, frobenius_norm, logdet, spectral_density, spectral_norm, trace

from .spectra import F64, Watched, generator, matrix

F32 = torch.float32
N = 64
ESTIMATES: dict[str, Callable[..., Any]] = {
    "hutchinson": lambda A, **kw: trace(A, method="hutchinson", **kw),
    "hutch++": lambda A, **kw: trace(A, method="hutch++", **kw),
    "xtrace": lambda A, **kw: trace(A, method="xtrace", **kw),
    "diagonal": lambda A, **kw: diagonal(A, method="hutchinson", **kw),
    "xdiag": lambda A, **kw: diagonal(A, method="xdiag", **kw),
    "frobenius": frobenius_norm,
    "logdet": logdet,
    "density": lambda A, **kw: spectral_density(A, steps=10, block=2, **kw),
}
EVERY = pytest.mark.parametrize("name", ESTIMATES)
POSITIVE = matrix(torch.logspace(-2, 0, N, dtype=F64))[0]


def values(found: Any, scale: float) -> Tensor:
    """The numbers of an estimate that scale with the operator, divided by the scale."""
    if hasattr(found, "grid"):
        return torch.cat([found.grid / scale, found.value * scale, found.high * scale])
    parts = [found.value, found.low, found.high, found.standard_error]
    return torch.stack([torch.as_tensor(part, dtype=F64) / scale for part in parts])


@pytest.mark.parametrize("budget", [48, 400])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 2.0**-100), (F32, 2.0**-40), (F32, 2.0**100), (F64, 2.0**-800), (F64, 2.0**800)],
)
@EVERY
def test_the_estimate_of_a_multiple_is_the_multiple_of_the_estimate(
    name: str, dtype: torch.dtype, scale: float, budget: int
) -> None:
    """A power of two changes no digit, so that nothing else may change."""
    one, other = (
        ESTIMATES[name](
            Dense((s * POSITIVE).to(dtype), symmetric=True), rtol=None, max_products=budget
        )
        for s in (1.0, scale)
    )
    assert (one.status, one.products) == (other.status, other.products)
    if name == "logdet":
        shift = N * math.log(scale)
        assert other.value - shift == pytest.approx(one.value, rel=1e-12, abs=1e-9)
        assert other.high - other.low == pytest.approx(one.high - one.low, rel=1e-6, abs=1e-9)
    else:
        torch.testing.assert_close(values(other, scale), values(one, 1.0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30)])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e30])
def test_norms_in_single_precision_at_any_scale(scale: float, shape: tuple[int, int]) -> None:
    M = torch.randn(shape, dtype=F64, generator=generator(0))
    M = M + M.T if shape == (40, 40) else M
    A = Dense((scale * M).float(), symmetric=shape == (40, 40))
    # rounding of the entries and of as many sums: at most n eps each way
    frobenius, largest = (torch.linalg.matrix_norm(M, ord=order).item() for order in ("fro", 2))
    assert frobenius_norm(A).value / scale == pytest.approx(frobenius, rel=1e-5)
    assert spectral_norm(A).value / scale == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@EVERY
def test_products_that_are_not_finite_raise(name: str, bad: float) -> None:
    d = torch.ones(N, dtype=F64)
    d[3] = bad
    with pytest.raises(FloatingPointError, match=r"<64x64 Diagonal .*a product is not finite"):
        ESTIMATES[name](Diagonal(d))
    with pytest.raises(FloatingPointError, match="not finite"):
        spectral_norm(Diagonal(d))


@EVERY
def test_equal_generators_are_equal_seeds(name: str) -> None:
    A = Damped(Dense(POSITIVE, symmetric=True), 0.1)
    first, again, other = (
        ESTIMATES[name](A, rtol=None, max_products=48, seed=generator(seed)).value
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(again))
    assert not torch.equal(torch.as_tensor(first), torch.as_tensor(other))
    source = generator(0)
    draws = [ESTIMATES[name](A, rtol=None, max_products=48, seed=source).value for _ in range(2)]
    assert not torch.equal(*(torch.as_tensor(draw) for draw in draws))


@EVERY
def test_seeds_of_another_kind_are_refused(name: str) -> None:
    for seed in (None, 1.5, "a", True):
        with pytest.raises(TypeError, match=r"seed as an integer or a torch\.Generator"):
            ESTIMATES[name](Identity(4), seed=seed)
    with pytest.raises(ValueError, match="63 bits"):
        ESTIMATES[name](Identity(4), seed=2**70)


SHAPES: dict[str, Callable[[int], Tensor]] = {
    "identity": lambda n: torch.ones(n, dtype=F64),
    "even": lambda n: torch.linspace(1, 3, n, dtype=F64),
    "slow": lambda n: 1 / torch.arange(1, n + 1, dtype=F64),
    "decaying": lambda n: 0.9 ** torch.arange(n, dtype=F64),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 17, 50, 150])
@EVERY
def test_no_estimate_costs_more_than_n_products_and_n_make_it_exact(
    name: str, n: int, shape: str
) -> None:
    d = SHAPES[shape](n)
    truths = {"frobenius": d.norm(), "logdet": d.log().sum(), "diagonal": d, "xdiag": d}
    for rtol in (None, 0.02, 1e-7):
        watched = Watched(Diagonal(d))
        found = ESTIMATES[name](watched.operator, rtol=rtol, max_products=4000)
        assert found.products == watched.products <= n
        assert found.status == "converged"
        if found.products == n and name != "density":
            truth = truths.get(name, d.sum())
            value = torch.as_tensor(found.value, dtype=F64)
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9)
            assert (torch.as_tensor(found.low, dtype=F64) <= truth).all()
            assert (truth <= torch.as_tensor(found.high, dtype=F64)).all()


def test_an_exact_density_is_that_of_the_eigenvalues() -> None:
    d = torch.linspace(0, 1, 50, dtype=F64)
    found = spectral_density(Diagonal(d))
    assert (found.products, found.status) == (50, "converged")
    torch.testing.assert_close(found.nodes[:, 0], d, rtol=0, atol=1e-12)
    assert torch.equal(found.low, found.high)


@EVERY
def test_ctrl_c_before_all_is_known_leaves_no_narrow_interval(name: str) -> None:
    watched = Watched(Dense(POSITIVE, symmetric=True), fail_at=3, error=KeyboardInterrupt)
    found = ESTIMATES[name](watched.operator, rtol=None, max_products=4000)
    assert found.status == "interrupted"
    value = torch.as_tensor(found.value)
    assert torch.isfinite(value).all()
    assert (torch.as_tensor(found.low) <= value).all()


LOW_ENDS = {
    "powers": torch.logspace(1, -12, 200, dtype=F64),
    "low rank": torch.cat([torch.logspace(2, -2, 20), torch.zeros(180)]).to(F64),
    "gap": torch.cat([torch.linspace(1, 10, 20), torch.logspace(-6, -7, 180)]).to(F64),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("budget", [60, 4000])
@pytest.mark.parametrize("case", LOW_ENDS)
def test_the_log_determinant_holds_or_says_that_the_low_end_is_unresolved(
    case: str, budget: int, damping: float, dtype: torch.dtype
) -> None:
    d = LOW_ENDS[case].to(dtype)
    A = Damped(Diagonal(d), damping)
    truth = A.to_dense().diagonal().double().log().sum().item()
    runs = [logdet(A, seed=seed, max_products=budget) for seed in range(12)]
    assert sum(f.low <= truth <= f.high or f.status == "low end unresolved" for f in runs) >= 10
    if dtype is F64:  # wide, but true, where it says so
        assert sum(f.low <= truth <= f.high for f in runs) >= 10


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("diagonal_of", [[1.0, -2.0], [1.0, 1.0, 1.0], [3.0], [5.0, 1e-20, 1e-20]])
def test_the_interval_of_the_spectral_norm_allows_for_rounding(
    diagonal_of: list[float], scale: float, dtype: torch.dtype
) -> None:
    entries = scale * torch.tensor(diagonal_of, dtype=dtype)
    found = spectral_norm(Diagonal(entries))
    assert found.low <= entries.abs().max().item() <= found.high
    assert found.high - found.low <= 40 * torch.finfo(dtype).eps * found.value


@pytest.mark.parametrize("budget", [None, "9", 2.5, True])
@pytest.mark.parametrize("name", [*ESTIMATES, "spectral norm"])
def test_a_budget_is_an_integer(name: str, budget: Any) -> None:
    estimate = {**ESTIMATES, "spectral norm": spectral_norm}[name]
    with pytest.raises(TypeError, match=r"expects max_products as an integer, got max_products="):
        estimate(Diagonal(torch.ones(9, dtype=F64)), max_products=budget)


def test_the_budget_of_a_spectral_norm_is_its_own() -> None:
    with pytest.raises(ValueError, match=r"spectral_norm expects max_products >= 2, got .*=1"):
        spectral_norm(Dense(torch.ones(3, 2)), max_products=1)
    with pytest.raises(ValueError, match="spectral_norm expects a finite rtol > 0"):
        spectral_norm(Diagonal(torch.ones(3)), rtol=0.0)


def test_a_tolerance_beyond_all_numbers_is_answered_exactly() -> None:
    """Right: the exact value, for n products. The rounds that sampling would take overflowed."""
    entries = torch.linspace(1, 10, 200, dtype=F64)
    found = logdet(Diagonal(entries), rtol=1e-300)
    assert found.products == 200
    assert found.low <= entries.log().sum().item() <= found.high
