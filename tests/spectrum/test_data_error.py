"""data_error=True: how far a quantity of a sample may be from that of the population, as often as said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from hvpop import (
    TOTAL,
    BatchForms,
    Damped,
    Dense,
    FromFunction,
    HessianOperator,
    Identity,
    LinearOperator,
)
from hvpop.spectrum import Eigenpairs, Estimate, eigsh, spectral_norm, trace
from tests.operators.registry import Averaged

from .spectra import F64, Watched, generator

RUNS = 400
COVERED = (0.92 * RUNS, 0.98 * RUNS)
SIZES = torch.tensor([60] * 11 + [25])  # ragged
SPECTRUM = torch.tensor([6.0, 2.0, 1.0, 0.5, 0.25], dtype=F64)  # of the population


def batches(seed: int, sizes: Tensor = SIZES, spectrum: Tensor = SPECTRUM) -> list[Tensor]:
    """Inputs of linear regression from the population whose Hessian has that spectrum."""
    draws = torch.randn(int(sizes.sum()), len(spectrum), dtype=F64, generator=generator(seed))
    return list((draws * (spectrum / 2).sqrt()).split(sizes.tolist()))


def sample(seed: int, *, normalized: bool = True, **population: Tensor) -> Averaged:
    """The Hessian ``2 X'X / n`` of mean squares on a sample, or the sum of those of its batches."""
    parts = batches(seed, **population)
    sizes = torch.tensor([float(len(X)) for X in parts])
    return Averaged(
        torch.stack([2 * X.T @ X / len(X) for X in parts]),
        sizes if normalized else torch.ones(len(sizes)),
        normalized=normalized,
    )


def regression(seed: int = 0, dtype: torch.dtype = F64, **settings: Any) -> HessianOperator:
    """The same Hessian, of a model."""
    data = [(X.to(dtype), X[:, :1].to(dtype)) for X in batches(seed)]
    return HessianOperator(nn.Linear(5, 1, bias=False).to(dtype), nn.MSELoss(), data, **settings)


def exact_trace_error(A: Averaged) -> float:
    """From the traces of the batches themselves."""
    traces = A.matrices.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    return BatchForms(traces, A.weights, A.normalized).standard_error().item()


def eigenvalue_errors(found: Eigenpairs) -> Tensor:
    assert found.data_errors is not None
    return found.data_errors


def error_of(found: Estimate) -> float:
    assert found.data_error is not None
    return found.data_error


# -- as often as it says ----------------------------------------------------------------------------


def covered(value_and_error: Callable[[Averaged], tuple[float, float]], truth: float) -> int:
    """In how many of 400 samples the population's value is within t standard errors."""
    t = float(stdtrit(len(SIZES) - 1, 0.975))
    hits = 0
    for seed in range(RUNS):
        value, error = value_and_error(sample(seed))
        hits += abs(value - truth) <= t * error
    return hits


def test_the_data_error_covers_the_trace_of_the_population() -> None:
    def estimated(A: Averaged) -> tuple[float, float]:
        found = trace(A, rtol=None, max_products=10, data_error=True)
        return found.value, error_of(found)

    hits = covered(estimated, SPECTRUM.sum().item())
    print(f"\ntrace of the population inside in {hits} of {RUNS} samples")
    assert COVERED[0] <= hits <= COVERED[1]


@pytest.mark.parametrize("block", [4, 16, 64])
def test_where_probes_are_too_few_the_data_error_of_the_trace_is_too_large_but_not_too_small(
    block: int,
) -> None:
    flat = torch.linspace(1, 3, 60, dtype=F64)
    t, hits, ratios = float(stdtrit(len(SIZES) - 1, 0.975)), 0, 0.0
    for seed in range(RUNS // 4):
        A = sample(seed, spectrum=flat)
        found = error_of(trace(A, max_products=4, block=block, seed=seed, data_error=True))
        hits += abs(A.matrix.trace() - flat.sum()).item() <= t * found
        ratios += found / exact_trace_error(A)
    print(f"\n{block} probes: {hits} of {RUNS // 4}, {ratios / (RUNS // 4):.2f} of the exact error")
    assert hits >= 0.92 * RUNS // 4
    assert ratios / (RUNS // 4) < {4: 6.0, 16: 2.5, 64: 1.3}[block]


def test_the_data_error_covers_the_largest_eigenvalue_of_the_population() -> None:
    def found(A: Averaged) -> tuple[float, float]:
        top = eigsh(A, 1, data_error=True)
        return top.eigenvalues.item(), eigenvalue_errors(top).item()

    hits = covered(found, SPECTRUM.max().item())
    print(f"\nlargest eigenvalue of the population inside in {hits} of {RUNS} samples")
    assert COVERED[0] <= hits <= COVERED[1]


def test_more_data_make_a_smaller_error() -> None:
    few, many = sample(0), sample(0, sizes=16 * SIZES)
    ratio = error_of(trace(few, data_error=True)) / error_of(trace(many, data_error=True))
    assert 2 < ratio < 8  # 4 on average


# -- what it is made of -----------------------------------------------------------------------------


def test_the_errors_of_eigenvalues_are_those_of_the_forms_of_their_vectors() -> None:
    A = sample(0)
    found = eigsh(A, 3, data_error=True)
    forms = A.batch_forms(found.eigenvectors)
    assert forms is not None
    assert torch.equal(eigenvalue_errors(found), forms.standard_error())
    norm = spectral_norm(-1.0 * A, data_error=True)
    assert error_of(norm) == pytest.approx(forms.standard_error()[-1].item(), rel=1e-4)


def test_the_error_of_the_trace_is_that_of_the_traces_of_the_batches() -> None:
    for normalized in (True, False):
        A = sample(1, normalized=normalized)
        found = trace(A, block=2000, max_products=4000, data_error=True)
        assert error_of(found) == pytest.approx(exact_trace_error(A), rel=0.05)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_the_noise_of_the_probes_is_no_error_of_the_data(method: Any) -> None:
    """Batches of equal traces that differ otherwise: every probe sees a spread, the trace has none."""
    M = torch.randn(8, 30, 30, dtype=F64, generator=generator(0))
    M = M + M.mT
    M.diagonal(dim1=1, dim2=2).fill_(2.0)
    A = Averaged(M, torch.ones(8))
    found = [trace(A, method=method, max_products=40, seed=s, data_error=True) for s in range(40)]
    squares = torch.tensor([error_of(f) for f in found]).square()
    one = torch.ones(30, 1, dtype=F64)
    forms = A.batch_forms(one)
    assert forms is not None
    seen_by_a_probe = forms.standard_error().square().item()
    assert squares.mean() < 0.1 * seen_by_a_probe


def test_the_square_of_the_error_of_the_trace_is_unbiased_where_probes_suffice() -> None:
    A = sample(2)
    squares = torch.tensor(
        [error_of(trace(A, max_products=10, seed=s, data_error=True)) ** 2 for s in range(300)]
    )
    off = squares.mean().item() - exact_trace_error(A) ** 2
    assert abs(off) < 4 * squares.std().item() / 300**0.5


# -- of a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "full"])
@pytest.mark.parametrize("total", [False, True])
def test_the_hessian_of_a_model_has_the_errors_of_its_matrices(mode: Any, total: bool) -> None:
    settings = {"mode": mode} | ({"average": TOTAL} if total else {})
    H, A = regression(**settings), sample(0, normalized=not total)
    for operator in (H, H.linearize()):
        found, expected = (eigsh(M, 2, data_error=True) for M in (operator, A))
        torch.testing.assert_close(eigenvalue_errors(found), eigenvalue_errors(expected))
        traced, expected_trace = (trace(M, data_error=True) for M in (operator, A))
        assert error_of(traced) == pytest.approx(error_of(expected_trace))


def test_damping_leaves_the_errors_and_scaling_scales_them() -> None:
    H = regression()
    plain, traced = eigsh(H, 2, data_error=True), trace(H, data_error=True)
    for A, scale in (
        (Damped(H, 0.3), 1.0),
        (3.0 * H, 3.0),
        (2.0 * H + 0.1 * Identity.like(H), 2.0),
        (Damped(H, 0.3).linearize(), 1.0),
    ):
        found = eigsh(A, 2, data_error=True)
        torch.testing.assert_close(
            eigenvalue_errors(found), scale * eigenvalue_errors(plain), rtol=1e-6, atol=0.0
        )
        assert error_of(trace(A, data_error=True)) == pytest.approx(scale * error_of(traced))


def test_single_precision_agrees() -> None:
    found = eigsh(regression(dtype=torch.float32), 2, data_error=True)
    assert eigenvalue_errors(found).dtype is torch.float32
    expected = eigenvalue_errors(eigsh(sample(0), 2, data_error=True))
    torch.testing.assert_close(eigenvalue_errors(found).double(), expected, rtol=1e-4, atol=0.0)
    single = error_of(trace(regression(dtype=torch.float32), data_error=True))
    assert single == pytest.approx(error_of(trace(regression(), data_error=True)), rel=1e-4)


# -- what it costs, and how it ends -----------------------------------------------------------------


class Counting(Averaged):
    """Counts products and looks at batches; interrupts one of either."""

    products = looks = 0
    stop_at_product = stop_at_look = 0

    def _apply(self, V: Tensor) -> Tensor:
        if self.products + V.shape[1] > self.stop_at_product > 0:
            raise KeyboardInterrupt
        self.products += V.shape[1]
        return super()._apply(V)

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms:
        self.looks += 1
        if self.looks == self.stop_at_look:
            raise KeyboardInterrupt
        self.products += V.shape[1] if batches is None else 0
        return super()._batch_forms(V, batches)


def counting(**stops: int) -> Counting:
    wide = torch.linspace(1.0, 3.0, 60, dtype=F64)
    A = sample(0, spectrum=wide)
    made = Counting(A.matrices, A.weights)
    for name, value in stops.items():
        setattr(made, name, value)
    return made


CALLS: dict[str, Callable[..., Any]] = {
    "eigsh": lambda A, **kw: eigsh(A, 3, **kw),
    "trace": trace,
    "hutchinson": lambda A, **kw: trace(A, method="hutchinson", block=10, **kw),
    "spectral norm": spectral_norm,
}
EXTRA = {"eigsh": 3, "trace": 16, "hutchinson": 10, "spectral norm": 1}
STOP = {"eigsh": 8, "trace": 40, "hutchinson": 25, "spectral norm": 8}
every = pytest.mark.parametrize("name", CALLS)


def error_in(result: Any) -> Any:
    return result.data_errors if isinstance(result, Eigenpairs) else result.data_error


@every
def test_one_more_pass_is_made_and_its_products_are_counted(name: str) -> None:
    A, without = counting(), CALLS[name](counting())
    found = CALLS[name](A, data_error=True)
    assert A.looks == 2  # at the first two batches, before; at all, afterwards
    assert found.products == A.products == without.products + EXTRA[name]
    assert error_in(without) is None
    assert repr(found).replace("data error", "") != repr(found)
    assert "data error" not in repr(without)
    assert CALLS[name](counting(), data_error=True, seed=0).history == found.history


def test_a_single_probe_a_round_makes_four_for_the_error() -> None:
    found = trace(sample(0), rtol=None, block=1, max_products=8, data_error=True)
    assert found.products == 5 + 4
    assert error_of(found) > 0.0


@every
def test_ctrl_c_on_the_way_returns_what_there_is_without_a_data_error(name: str) -> None:
    A = counting(stop_at_product=STOP[name])
    found = CALLS[name](A, rtol=1e-9, data_error=True)
    assert found.status == "interrupted"
    assert error_in(found) is None
    assert A.looks == 1


@every
def test_ctrl_c_at_the_last_pass_keeps_the_result(name: str) -> None:
    found, whole = CALLS[name](counting(stop_at_look=2), data_error=True), CALLS[name](counting())
    assert found.status == "interrupted"
    assert error_in(found) is None
    assert found.products == whole.products
    assert found.history == whole.history


@every
def test_a_finished_checkpoint_gives_the_data_error_when_it_is_asked_for(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    expected = CALLS[name](counting(), data_error=True)
    part = CALLS[name](counting(stop_at_product=STOP[name]), checkpoint=path)
    assert part.status == "interrupted"
    resumed = CALLS[name](counting(), checkpoint=path, data_error=True)
    again = CALLS[name](counting(), checkpoint=path, data_error=True)
    for found in (resumed, again):
        assert found.status == expected.status
        assert found.products == expected.products
        assert torch.equal(torch.as_tensor(error_in(found)), torch.as_tensor(error_in(expected)))


# -- refusals ---------------------------------------------------------------------------------------


@every
def test_an_operator_that_is_no_average_over_data_is_refused_before_any_product(name: str) -> None:
    watched = Watched(Dense(sample(0).matrix, symmetric=True))
    with pytest.raises(ValueError, match=r"data_error=True expects an average over data \(a Hess"):
        CALLS[name](watched.operator, data_error=True)
    assert watched.products == 0


REFUSED: dict[str, tuple[str, Callable[[], LinearOperator]]] = {
    "a matrix": (
        "got <5x5 Dense float64 cpu>; leave",
        lambda: Dense(sample(0).matrix, symmetric=True),
    ),
    "a square": (r"got <5x5 Power\(2\)", lambda: sample(0) ** 2),
    "a function": ("FromFunction", lambda: FromFunction(lambda V: V, (5, 5), symmetric=True)),
    "one batch": (
        "two batches or more, got one batch in <5x5 Averaged.*; split",
        lambda: sample(0, sizes=torch.tensor([50])),
    ),
    "two averages": ("2 of its terms have data in them", lambda: sample(0) - sample(1)),
}


@every
@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_in_words_that_help(mistake: str, name: str) -> None:
    words, make = REFUSED[mistake]
    with pytest.raises(ValueError, match=words):
        CALLS[name](make(), data_error=True)


def test_a_norm_of_an_operator_that_is_not_symmetric_has_no_data_error() -> None:
    with pytest.raises(ValueError, match=r"data_error=True expects a symmetric operator"):
        spectral_norm(sample(0) + Dense(torch.ones(5, 5, dtype=F64)), data_error=True)
