"""Estimates: error bars that cover the truth as often as they say, and sampling that stops in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvpop import Damped, Dense, Diagonal, FromFunction, Identity, LinearOperator
from hvpop.spectrum import (
    Density,
    Estimate,
    diagonal,
    frobenius_norm,
    logdet,
    spectral_density,
    spectral_norm,
    trace,
)

from .spectra import F64, Watched, dense, generator, matrix

N = 80
RUNS = 400
COVERED = (0.92 * RUNS, 0.98 * RUNS)

FLAT = torch.linspace(1, 3, N, dtype=F64)
DECAYING = (0.85 ** torch.arange(N)).to(F64)
SLOW = 1 / torch.arange(1, N + 1, dtype=F64)
INDEFINITE = torch.cat([3 * 0.8 ** torch.arange(40), -(0.8 ** torch.arange(40))]).to(F64)
LONG = torch.linspace(1, 3, 400, dtype=F64)  # with a budget below 400 never known exactly
STEP = torch.cat([torch.ones(10), 1e-3 * torch.ones(N - 10)]).to(F64)
CASES = {"flat": FLAT, "decaying": DECAYING, "slow": SLOW, "indefinite": INDEFINITE, "step": STEP}


def covered(estimate: Callable[[int], Estimate], truth: float) -> int:
    """In how many of 400 seeded runs the band holds the truth."""
    hits = 0
    for seed in range(RUNS):
        found = estimate(seed)
        hits += found.low <= truth <= found.high
    return hits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_bands_of_the_trace_cover_it(method: Any, case: str) -> None:
    A = dense(CASES[case])
    hits = covered(
        lambda seed: trace(A, method=method, rtol=None, max_products=48, seed=seed),
        CASES[case].sum().item(),
    )
    assert COVERED[0] <= hits <= COVERED[1]


@pytest.mark.parametrize(
    ("method", "rtol"), [("hutchinson", 0.15), ("hutch++", 0.02), ("xtrace", 0.02)]
)
def test_bands_cover_when_sampling_stops_by_itself(method: Any, rtol: float) -> None:
    spectrum = 1 / torch.arange(1, 2 * N + 1, dtype=F64)
    A, truth = dense(spectrum), spectrum.sum().item()
    found = [
        trace(A, method=method, rtol=rtol, max_products=2 * N - 1, seed=seed)
        for seed in range(RUNS)
    ]
    hits = sum(f.low <= truth <= f.high for f in found)
    assert {f.status for f in found} == {"converged"}
    assert all((f.high - f.low) / 2 <= 1.01 * rtol * abs(f.value) for f in found)
    assert COVERED[0] <= hits <= COVERED[1]


@pytest.mark.parametrize("case", ["flat", "decaying", "indefinite"])
@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_bands_of_the_diagonal_cover_its_entries(method: Any, case: str) -> None:
    A = dense(CASES[case])
    truth = A.matrix.diagonal()
    share = 0.0
    for seed in range(RUNS):
        found = diagonal(A, method=method, rtol=None, max_products=32, seed=seed)
        share += ((found.low <= truth) & (truth <= found.high)).double().mean().item()
    assert COVERED[0] <= share <= COVERED[1]


@pytest.mark.parametrize("case", ["flat", "slow", "indefinite"])
def test_bands_of_the_frobenius_norm_cover_it(case: str) -> None:
    A = dense(CASES[case])
    hits = covered(
        lambda seed: frobenius_norm(A, rtol=None, max_products=48, seed=seed),
        torch.linalg.vector_norm(CASES[case]).item(),
    )
    assert COVERED[0] <= hits <= COVERED[1]


@pytest.mark.parametrize("case", ["flat", "decaying"])
def test_bands_of_the_frobenius_norm_of_long_vectors_cover_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvpop.spectrum.norms._GROWS", 0)
    A, truth = dense(CASES[case]), torch.linalg.vector_norm(CASES[case]).item()
    hits = covered(lambda seed: frobenius_norm(A, rtol=None, max_products=64, seed=seed), truth)
    assert COVERED[0] <= hits <= COVERED[1]


def test_the_frobenius_norm_of_long_vectors_is_exact_on_a_small_range_and_goes_on_from_a_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hvpop.spectrum.norms._GROWS", 0)
    M = torch.randn(60, 5, dtype=F64, generator=generator(0))
    found = frobenius_norm(Dense(M @ M[:40].T))
    assert found.value == pytest.approx(torch.linalg.matrix_norm(M @ M[:40].T).item(), rel=1e-12)
    A, file = dense(SLOW), tmp_path / "norm.pt"
    frobenius_norm(A, rtol=None, max_products=40, checkpoint=file)
    whole = frobenius_norm(A, rtol=None, max_products=70)
    found = frobenius_norm(A, rtol=None, max_products=70, checkpoint=file)
    assert found.value == pytest.approx(whole.value, rel=1e-12)
    assert found.standard_error == pytest.approx(whole.standard_error, rel=1e-9)


@pytest.mark.parametrize("case", ["flat", "slow"])
def test_bands_of_the_log_determinant_cover_it(case: str) -> None:
    n = 1100  # beyond 1024, where probes share no space
    damped = {"flat": torch.linspace(1, 3, n), "slow": 1 / torch.arange(1, n + 1)}[case].to(
        F64
    ) + 0.1
    hits = covered(
        lambda seed: logdet(Diagonal(damped), rtol=None, max_products=260, seed=seed),
        damped.log().sum().item(),
    )
    # its interval holds the gap between two quadratures beside the probes' spread: at least as sure
    assert hits >= COVERED[0]


def outliers(n: int) -> torch.Tensor:
    return torch.cat([torch.linspace(0, 1, n - 3), torch.tensor([2.0, 2.5, 4.0])]).to(F64)


@pytest.mark.parametrize("case", ["flat", "outliers"])
def test_bands_of_the_density_cover_the_smoothed_spectrum(case: str) -> None:
    spectrum = {"flat": torch.linspace(1, 3, 1100, dtype=F64), "outliers": outliers(1100)}[case]
    A = Diagonal(spectrum)
    width = 0.03 * (spectrum.max() - spectrum.min()).item()
    share = 0.0
    for seed in range(RUNS):
        found = spectral_density(A, steps=30, width=width, max_products=150, seed=seed)
        truth = smoothed(spectrum, found)
        there = truth > 1e-3 * truth.max()
        inside = (found.low <= truth) & (truth <= found.high)
        share += inside[there].double().mean().item()
    assert COVERED[0] <= share <= COVERED[1]


def smoothed(spectrum: torch.Tensor, density: Density) -> torch.Tensor:
    x = (density.grid[:, None] - spectrum) / density.width
    return torch.exp(-(x**2) / 2).mean(1) / (density.width * (2 * torch.pi) ** 0.5)


def test_sketches_beat_hutchinson_at_equal_products_on_a_decaying_spectrum() -> None:
    spectrum = (0.9 ** torch.arange(300)).to(F64)
    A, truth = dense(spectrum), spectrum.sum().item()
    methods: tuple[Any, ...] = ("hutchinson", "hutch++", "xtrace")
    print("\nroot mean square error of the trace of 0.9^i, n = 300, 40 runs, relative")
    print("products " + "".join(f"{method:>12}" for method in methods))
    for products in (48, 96, 192):
        errors = []
        for method in methods:
            runs = [
                trace(A, method=method, rtol=None, max_products=products, seed=seed).value / truth
                - 1
                for seed in range(40)
            ]
            errors.append(torch.tensor(runs).square().mean().sqrt().item())
        print(f"{products:8d} " + "".join(f"{error:12.1e}" for error in errors))
        assert errors[1] < errors[0]
        assert errors[2] < errors[0]
    assert errors[2] < errors[1] < 0.01 * errors[0]


ESTIMATES: dict[str, Callable[..., Any]] = {
    "hutchinson": lambda A, **kw: trace(A, method="hutchinson", **kw),
    "hutch++": lambda A, **kw: trace(A, method="hutch++", **kw),
    "xtrace": lambda A, **kw: trace(A, method="xtrace", **kw),
    "diagonal": lambda A, **kw: diagonal(A, method="hutchinson", **kw),
    "xdiag": lambda A, **kw: diagonal(A, method="xdiag", **kw),
    "frobenius": frobenius_norm,
    "logdet": logdet,
}
every = pytest.mark.parametrize("name", ESTIMATES)


@every
def test_products_are_counted_and_come_in_blocks(name: str) -> None:
    watched = Watched(dense(LONG))
    found = ESTIMATES[name](watched.operator, rtol=None, max_products=96)
    assert found.products == watched.products <= 96
    assert found.status == "max products"
    assert watched.products >= 8 * watched.passes


@every
def test_an_estimate_is_its_seed_alone(name: str) -> None:
    A = dense(FLAT)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ESTIMATES[name](A, rtol=None, max_products=64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (ESTIMATES[name](A, rtol=None, max_products=64, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.as_tensor(first.value), torch.as_tensor(again.value))
    assert not torch.equal(torch.as_tensor(first.value), torch.as_tensor(other.value))


@every
def test_ctrl_c_returns_what_there_is(name: str) -> None:
    watched = Watched(dense(LONG), fail_at=6, error=KeyboardInterrupt)
    found = ESTIMATES[name](watched.operator, rtol=None, max_products=399)
    assert found.status == "interrupted"
    assert 0 < found.products <= watched.products
    value = torch.as_tensor(found.value)
    assert torch.isfinite(value).all()
    assert (torch.as_tensor(found.low) <= value).all()


@every
def test_progress_shows_the_estimate(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ESTIMATES[name](dense(FLAT), rtol=None, max_products=64, progress=True)
    assert "+-" in capsys.readouterr().err


@every
def test_single_precision_agrees(name: str) -> None:
    M, _ = matrix(LONG)
    found = ESTIMATES[name](Dense(M.float(), symmetric=True), rtol=None, max_products=96)
    truths = {"diagonal": M.diagonal(), "xdiag": M.diagonal(), "logdet": M.logdet()}
    truth = truths.get(name, M.trace())
    if name == "frobenius":
        truth = torch.linalg.matrix_norm(M)
    errors = (torch.as_tensor(found.value) - truth).abs()
    assert (errors <= 4 * torch.as_tensor(found.standard_error)).all()


@every
def test_a_budget_for_less_than_two_probes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="max_products >="):
        ESTIMATES[name](dense(FLAT), max_products=1)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("rank", [0, 1, 7, 12])
def test_the_trace_of_low_rank_is_exact(method: Any, rank: int) -> None:
    spectrum = torch.cat([torch.linspace(1, 2, rank), torch.zeros(60 - rank)]).to(F64)
    found = trace(dense(spectrum), method=method, rtol=None, max_products=48)
    assert found.value == pytest.approx(spectrum.sum().item(), rel=1e-9, abs=1e-9)
    assert found.standard_error < 1e-6


@pytest.mark.parametrize("name", ["hutch++", "xtrace", "xdiag", "frobenius"])
def test_a_sketch_of_the_whole_space_is_exact_and_ends(name: str) -> None:
    A = dense(FLAT[:20])
    found = ESTIMATES[name](A, rtol=None, max_products=1000)
    M = A.matrix
    truth = {"xdiag": M.diagonal(), "frobenius": torch.linalg.matrix_norm(M)}.get(name, M.trace())
    assert found.status == "converged"
    torch.testing.assert_close(torch.as_tensor(found.value, dtype=F64), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2])
@every
def test_tiny_operators(name: str, n: int) -> None:
    found = ESTIMATES[name](Identity(n), max_products=60)
    truth = {"frobenius": n**0.5, "logdet": 0.0, "diagonal": 1.0, "xdiag": 1.0}.get(name, float(n))
    value = torch.as_tensor(found.value, dtype=F64)
    torch.testing.assert_close(value, torch.full_like(value, truth), rtol=1e-9, atol=1e-9)


def test_the_frobenius_norm_of_a_rectangular_operator() -> None:
    M = torch.randn(40, 90, dtype=F64, generator=generator(0))
    for matrix_ in (M, M.T.contiguous()):
        found = frobenius_norm(Dense(matrix_), rtol=0.03)
        assert found.status == "converged"
        assert found.low <= torch.linalg.matrix_norm(M).item() <= found.high


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_trace_of_a_tiny_operator_is_exact(n: int) -> None:
    found = trace(Diagonal(torch.arange(1.0, n + 1, dtype=F64)))
    assert found.status == "converged"
    assert found.value == pytest.approx(n * (n + 1) / 2, rel=1e-13)
    assert found.high - found.low < 1e-12


def test_the_trace_of_an_operator_that_is_not_symmetric() -> None:
    M = torch.randn(50, 50, dtype=F64, generator=generator(0)) + 10 * torch.eye(50, dtype=F64)
    found = trace(Dense(M), method="hutchinson", rtol=0.02)
    assert found.low <= M.trace().item() <= found.high


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40)])
def test_the_spectral_norm_is_found(shape: tuple[int, int]) -> None:
    M = torch.randn(shape, dtype=F64, generator=generator(0))
    A = Dense(M + M.T, symmetric=True) if shape[0] == shape[1] else Dense(M)
    truth = torch.linalg.matrix_norm(A.matrix, ord=2).item()
    found = spectral_norm(A)
    assert found.status == "converged"
    assert found.low * (1 - 1e-12) <= truth <= found.high
    assert found.value == pytest.approx(truth, rel=1e-3)


def test_the_spectral_norm_of_a_product_is_found() -> None:
    M, R = (torch.randn(shape, dtype=F64, generator=generator(1)) for shape in ((30, 30), (9, 30)))
    symmetric, rectangular = Dense(M + M.T, symmetric=True), Dense(R)
    damped = Damped(symmetric, 0.5)
    for A in (rectangular @ symmetric, -2 * (rectangular @ symmetric), damped @ symmetric):
        truth = torch.linalg.matrix_norm(A.to_dense(), ord=2).item()
        assert spectral_norm(A).value == pytest.approx(truth, rel=1e-3)


def test_the_log_determinant_of_an_indefinite_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positive definite.*add damping"):
        logdet(dense(INDEFINITE))


def test_an_unsettled_log_determinant_says_so_in_its_band() -> None:
    spectrum = torch.logspace(-6, 0, 200, dtype=F64)
    found = logdet(dense(spectrum), rtol=None, max_products=160)
    assert found.status == "low end unresolved"
    assert (found.high - found.low) / 2 > 3 * found.standard_error


def test_the_density_integrates_to_one_and_its_weights_too() -> None:
    found = spectral_density(Diagonal(outliers(1100)))
    assert torch.trapezoid(found.value, found.grid).item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(found.weights.sum(0), torch.ones(8, dtype=F64))
    assert found.nodes.shape == found.weights.shape == (64, 8)
    assert (found.status, found.products) == ("max products", 512)


def test_the_density_of_many_probes_is_that_of_the_spectrum() -> None:
    found = spectral_density(
        Diagonal(outliers(9000)), width=0.1, rtol=0.05, max_products=8999, block=64
    )
    truth = smoothed(outliers(9000), found)
    assert found.status == "converged"
    assert torch.trapezoid((found.value - truth).abs(), found.grid).item() < 0.05


@pytest.mark.parametrize("fail_at", [3, 20, 70])
def test_an_interrupted_density_is_a_coarser_one(fail_at: int) -> None:
    watched = Watched(Diagonal(outliers(2000)), fail_at=fail_at, error=KeyboardInterrupt)
    found = spectral_density(watched.operator, max_products=1999)
    assert found.status == "interrupted"
    assert found.nodes.shape[0] == min(64, fail_at - 1)
    assert torch.trapezoid(found.value, found.grid).item() == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_the_density_of_one_repeated_eigenvalue(value: float) -> None:
    found = spectral_density(Diagonal(torch.full((30,), value, dtype=F64)))
    assert found.grid[found.value.argmax()].item() == pytest.approx(value, abs=2 * found.width)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A: trace(A, method="girard"), ValueError, "method in"),
        (lambda A: diagonal(A, method="girard"), ValueError, "method in"),
        (lambda A: trace(A, rtol=0.0), ValueError, "rtol > 0"),
        (lambda A: trace(A, block=0), ValueError, "block >= 1"),
        (lambda A: trace(A, block="a"), TypeError, "block as an integer, got block='a'"),
        (lambda A: trace(A, max_products=64.5), TypeError, "max_products as an integer"),
        (lambda A: trace(A), ValueError, "symmetric=False"),
        (lambda A: logdet(A), ValueError, "symmetric=False"),
        (lambda A: spectral_density(A), ValueError, "symmetric=False"),
        (lambda A: trace(A.matrix), TypeError, "got Tensor; wrap a matrix in hvpop.Dense"),
        (
            lambda A: trace(torch.nn.Linear(2, 1)),
            TypeError,
            r"got Linear; .* HessianOperator\(model, ",
        ),
    ],
)
def test_misuse_is_refused(
    call: Callable[[LinearOperator], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(Dense(torch.ones(4, 4), symmetric="symmetric" not in message))


def test_a_square_operator_is_asked_for() -> None:
    with pytest.raises(ValueError, match="square"):
        trace(FromFunction(lambda V: V[:2], (2, 3)), method="hutchinson")
