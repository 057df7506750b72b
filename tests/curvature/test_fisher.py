"""The Fisher matrix is that of the distribution a loss is the likelihood of, or there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hvpop import (
    TOTAL,
    EmpiricalFisherOperator,
    EmpiricalRisk,
    FisherOperator,
    GaussNewtonOperator,
    outputs,
)
from hvpop.marker import Call
from hvpop.risk import hugging_face
from hvpop.risk.likelihoods import Counter, likelihood_of

from .problems import error, mlp, random, split
from .test_gauss_newton import (
    BITS,
    EXACT,
    IGNORED,
    LABELS,
    LOSSES,
    REAL,
    SIZES,
    STRATEGIES,
    WEIGHTS,
    Headed,
    X,
    normed,
    penalized,
    risk,
    unmarked,
)
from .test_gradients import TAGS, TEXT, flattened, focal, tagger
from .test_jacobian import rows

COUNTS = REAL.exp().round()
SOFT = random(23, 3, seed=21).softmax(1)


def fisher(model: nn.Module, loss: Any, targets: Any, sizes: Any = SIZES, **options: Any) -> Any:
    return FisherOperator(model, loss, split((X, targets), sizes), **options)


def poisson_of_rates(z: Tensor, t: Tensor) -> Tensor:
    return F.poisson_nll_loss(F.softplus(z), t, log_input=False)


def of_probabilities(z: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), t)


def of_log_probabilities(z: Tensor, t: Tensor) -> Tensor:
    return F.nll_loss(z.log_softmax(1), t)


def of_variance(z: Tensor, t: Tensor) -> Tensor:
    return F.gaussian_nll_loss(z, t, 0.3 + t.abs())


def halved(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(z, t)


def by_hand(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="none").mean()


# where the distribution has the outputs as natural parameters
EQUAL: dict[str, tuple[Any, Tensor]] = {
    **{n: LOSSES[n] for n in ("cross entropy", "class weights", "ignored targets", "both")},
    **{n: LOSSES[n] for n in ("mse", "poisson")},
    "bits": (nn.BCEWithLogitsLoss(), BITS),
    "weighted bits": (nn.BCEWithLogitsLoss(weight=WEIGHTS), BITS),
    "soft targets": (nn.CrossEntropyLoss(), SOFT),
    "half squares": (halved, REAL),
    "given variance": (of_variance, REAL),
    "without a reduction": (by_hand, LABELS),
    "log probabilities": (of_log_probabilities, LABELS),
}

# where it has not: the information in z, entry by entry, and what it is by hand
OTHERS: dict[str, tuple[Any, Tensor, Callable[[Tensor], Tensor]]] = {
    "rates": (poisson_of_rates, COUNTS, lambda z: z.sigmoid() ** 2 / F.softplus(z)),
    "probabilities": (of_probabilities, BITS, lambda z: z.sigmoid() * (1 - z.sigmoid())),
    "absolute": (nn.L1Loss(), REAL, torch.ones_like),
}


def whole(loss: Any, targets: Tensor) -> Tensor:
    return GaussNewtonOperator(mlp(), loss, [(X, targets)]).to_dense()


@pytest.mark.parametrize("name", EQUAL)
def test_it_is_gauss_newton_where_the_outputs_are_natural_parameters(name: str) -> None:
    loss, targets = EQUAL[name]
    truth = whole(loss, targets)
    A = fisher(mlp(), loss, targets, [23] if name == "given variance" else SIZES)
    assert error(A.to_dense(), truth) < EXACT
    assert error(A.linearize().to_dense(), truth) < EXACT
    values = torch.linalg.eigvalsh(A.to_dense())
    assert values[0] > -EXACT * values[-1]


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_information_of_the_distribution_where_they_are_not(name: str) -> None:
    loss, targets, information = OTHERS[name]
    model = mlp()
    z = model(X)
    J = rows(model, z)
    truth = J.mT @ (information(z.detach()).reshape(-1, 1) / 69 * J)
    A = fisher(mlp(), loss, targets)
    assert error(A.to_dense(), truth) < EXACT
    if name != "probabilities":  # which are marked as logits here
        assert error(whole(loss, targets), truth) > 0.05  # Gauss-Newton has the targets in it


def expected(loss: Any, z: Tensor, outcomes: Tensor, p: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of squared derivatives over all targets of an entry, entry by entry."""
    total = torch.zeros_like(z)
    for y in outcomes:
        leaf = z.clone().requires_grad_()
        target = torch.full_like(z, float(y))
        (r,) = torch.autograd.grad(loss(leaf, target, reduction="sum"), leaf)
        total += p(target) * r**2
    return total


def test_informations_are_the_means_of_squared_scores() -> None:
    z = random(5, 2, seed=3)
    ones = torch.ones_like(z)

    def information(loss: Any, z: Tensor, **settings: Any) -> Tensor:
        call = Call(loss, z, (torch.zeros_like(z),), settings, None)
        return likelihood_of(call).information(ones)

    p = z.sigmoid()
    bits = torch.tensor([0.0, 1.0])
    assert (
        error(
            information(F.binary_cross_entropy_with_logits, z),
            expected(
                F.binary_cross_entropy_with_logits, z, bits, lambda y: y * p + (1 - y) * (1 - p)
            ),
        )
        < EXACT
    )
    assert (
        error(
            information(F.binary_cross_entropy, p),
            expected(F.binary_cross_entropy, p, bits, lambda y: y * p + (1 - y) * (1 - p)),
        )
        < EXACT
    )
    counts = torch.arange(80.0)

    def poisson(rate: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: torch.exp(y * rate.log() - rate - torch.lgamma(y + 1))

    assert (
        error(
            information(F.poisson_nll_loss, z),
            expected(F.poisson_nll_loss, z, counts, poisson(z.exp())),
        )
        < EXACT
    )


# --- drawn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EQUAL, *OTHERS])
def test_draws_have_the_exact_matrix_as_their_mean(name: str) -> None:
    loss, targets = {**EQUAL, **OTHERS}[name][:2]
    exact, v = fisher(mlp(), loss, targets, [23]), random(43, seed=9)
    sampled = fisher(mlp(), loss, targets, [23], samples=400)
    form = float(v @ (sampled @ v))
    assert abs(form - float(v @ (exact @ v))) < 4 * float(sampled.sampling_error(v)) + EXACT * form


@pytest.mark.parametrize("name", ["both", "mse", "poisson", "bits"])
def test_draws_are_the_same_however_they_are_asked_for(name: str) -> None:
    loss, targets = EQUAL[name]
    V = random(43, 5, seed=9)
    A = fisher(mlp(), loss, targets, [23], samples=3, seed=4)
    truth = A @ V
    for sizes in (SIZES, [1] * 23, [2, 21]):
        B = fisher(mlp(), loss, targets, sizes, samples=3, seed=4)
        for operator in (B, B.linearize(), B.linearize(memory=0)):
            assert error(operator @ V, truth) < EXACT
            assert error(operator @ V[:, 2], truth[:, 2]) < EXACT
        assert error(B.block("2.*").to_dense(), A.to_dense()[25:, 25:]) < EXACT
    assert error(fisher(mlp(), loss, targets, samples=3, seed=5) @ V, truth) > 1e-3


@pytest.mark.parametrize("name", ["both", "mse", "bits"])
def test_one_draw_is_the_empirical_fisher_of_its_targets(name: str) -> None:
    loss, targets = EQUAL[name]
    A = fisher(mlp(), loss, targets, samples=1)
    V = random(43, 3, seed=9)
    values = torch.linalg.eigvalsh(A.to_dense())
    assert values[0] > -EXACT * values[-1]
    rank = int((values > 1e-12 * values[-1]).sum())
    assert rank <= (69 if name != "both" else 18)
    assert error(A @ V, A.to_dense() @ V) < EXACT


def test_a_term_for_each_token_has_draws_of_its_own() -> None:
    for loss in (nn.CrossEntropyLoss(), flattened):
        risks = [
            EmpiricalRisk(tagger(), loss, split((TEXT, TAGS), sizes), average=TOTAL)
            for sizes in ([9], [4, 4, 1])
        ]
        whole = FisherOperator.from_risk(risks[0])
        assert error(whole.to_dense(), GaussNewtonOperator.from_risk(risks[0]).to_dense()) < EXACT
        sampled = FisherOperator.from_risk(risks[0], samples=600)
        v = random(whole.shape[1], seed=3)
        gap = abs(float(v @ (sampled @ v) - v @ (whole @ v)))
        assert gap < 4 * float(sampled.sampling_error(v))
    data = split((TEXT, TAGS), [4, 4, 1])
    one = FisherOperator(tagger(), nn.CrossEntropyLoss(), [(TEXT, TAGS)], samples=2)
    other = FisherOperator(tagger(), nn.CrossEntropyLoss(), data, samples=2)
    assert error(other.to_dense(), one.to_dense()) < EXACT


def test_the_error_falls_as_the_root_of_the_number_of_draws() -> None:
    loss, targets = EQUAL["cross entropy"]
    truth = whole(loss, targets)
    sizes, errors = (4, 16, 64, 256), []
    for samples in sizes:
        found = [
            error(fisher(mlp(), loss, targets, [23], samples=samples, seed=s).to_dense(), truth)
            for s in range(12)
        ]
        errors.append(float(np.sqrt(np.mean(np.square(found)))))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    # 12 runs of some ten degrees of freedom each: 6 % an error, 0.02 of a slope over 4 octaves
    assert -0.56 < slope < -0.44


@pytest.mark.parametrize("name", ["both", "mse"])
def test_bands_cover_the_exact_form_as_often_as_they_say(name: str) -> None:
    loss, targets = EQUAL[name]
    v = random(43, seed=9)
    truth = float(v @ (fisher(mlp(), loss, targets, [23]) @ v))
    covered = 0
    for seed in range(400):
        A = fisher(mlp(), loss, targets, [23], samples=40, seed=seed)
        covered += abs(float(v @ (A @ v)) - truth) <= 1.96 * float(A.sampling_error(v))
    assert 0.92 <= covered / 400 <= 0.98


def test_the_error_is_of_columns_and_takes_two_draws() -> None:
    loss, targets = EQUAL["both"]
    A, V = fisher(mlp(), loss, targets, samples=5), random(43, 3)
    found = A.sampling_error(V)
    assert found.shape == (3,)
    assert error(found[1], A.sampling_error(V[:, 1])) < EXACT
    assert error(torch.from_numpy(A.sampling_error(V.numpy())), found) < EXACT
    assert error(fisher(mlp(), loss, targets, [23], samples=5).sampling_error(V), found) < EXACT
    for operator in (fisher(mlp(), loss, targets), fisher(mlp(), loss, targets, samples=1)):
        with pytest.raises(ValueError, match="takes at least two, samples=2"):
            operator.sampling_error(V)
    with pytest.raises(ValueError, match=r"expects shape \(43,\) or \(43, k\), got \(42,\)"):
        A.sampling_error(V[1:, 0])
    with pytest.raises(
        ValueError, match="samples must be an integer > 0, or None for exact, got 0"
    ):
        fisher(mlp(), loss, targets, samples=0)


def test_a_counter_gives_uniform_numbers_that_do_not_see_each_other() -> None:
    sample, entry = torch.arange(400)[:, None], torch.arange(50)[None]
    u = Counter(3).uniform(sample + 0 * entry, 0 * sample + entry, 5).reshape(-1)
    n = u.numel()  # 100,000
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    counts = torch.histc(u.float(), 100, 0, 1)
    assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 99 + 5 * (2 * 99) ** 0.5
    cube = u.reshape(5, 400, 50) - 0.5
    for a, b in (
        (cube[1:], cube[:-1]),
        (cube[:, 1:], cube[:, :-1]),
        (cube[..., 1:], cube[..., :-1]),
    ):
        correlation = float((a * b).mean() * 12)
        assert abs(correlation) < 5 / a.numel() ** 0.5


# --- splits, strategies, sources ------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(1, 22), max_size=6, unique=True),
    name=st.sampled_from([n for n in EQUAL if n != "given variance"]),
    samples=st.sampled_from([None, 2]),
)
def test_no_split_into_batches_changes_it(cuts: list[int], name: str, samples: int | None) -> None:
    sizes = [b - a for a, b in pairwise([0, *sorted(cuts), 23])]
    loss, targets = EQUAL[name]
    v = random(43, seed=6)
    truth = fisher(mlp(), loss, targets, [23], samples=samples) @ v
    A = fisher(mlp(), loss, targets, sizes, samples=samples)
    assert error(A @ v, truth) < EXACT
    assert error(A.linearize() @ v, truth) < EXACT


@STRATEGIES
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("linearized", [False, True])
def test_every_strategy_gives_it(
    strategy: Any, tolerance: float, linearized: bool, samples: int | None
) -> None:
    loss, targets = LOSSES["both"]
    truth = fisher(normed(), loss, targets, [23], samples=samples).to_dense()
    A = fisher(normed(), loss, targets, samples=samples, strategy=copy.copy(strategy))
    if linearized:
        A = A.linearize()
    V = random(A.shape[1], 9, seed=5)
    assert error(A @ V, truth @ V) < tolerance
    assert error(A @ V[:, 0], truth @ V[:, 0]) < tolerance


def test_a_batch_loss_and_the_head_of_a_model_have_it() -> None:
    def marked(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(outputs(model(batch[0])), batch[1])

    truth = whole(nn.CrossEntropyLoss(), LABELS)
    assert error(FisherOperator.from_risk(risk(marked)).to_dense(), truth) < EXACT
    assert error(FisherOperator.from_risk(risk(unmarked)).to_dense(), truth) < EXACT
    data = [{"x": x, "labels": t} for x, t in split((X, IGNORED), SIZES)]
    headed = EmpiricalRisk.from_batch_loss(Headed(), hugging_face(), data)
    truth = whole(nn.CrossEntropyLoss(), IGNORED)
    assert error(FisherOperator.from_risk(headed).to_dense(), truth) < EXACT


def test_a_loss_for_the_record_is_no_part_of_it() -> None:
    def recorded(z: Tensor, t: Tensor) -> Tensor:
        F.huber_loss(z, torch.zeros_like(z))
        return 2.0 * F.cross_entropy(z, t)

    truth = 2 * whole(nn.CrossEntropyLoss(), LABELS)
    assert error(fisher(mlp(), recorded, LABELS).to_dense(), truth) < EXACT
    one = fisher(mlp(), nn.CrossEntropyLoss(), LABELS, samples=3).to_dense()
    assert error(fisher(mlp(), recorded, LABELS, samples=3).to_dense(), 2 * one) < EXACT


def test_of_two_likelihoods_it_is_the_sum() -> None:
    def two(model: nn.Module, batch: Any) -> Tensor:
        z = model(batch[0])
        return F.cross_entropy(z[:, :2], batch[1] % 2) + 0.3 * F.mse_loss(z[:, 2], batch[0][:, 0])

    data = [(X, LABELS)]
    A = FisherOperator.from_risk(EmpiricalRisk.from_batch_loss(mlp(), two, data))

    def marked(model: nn.Module, batch: Any) -> Tensor:
        z = outputs(model(batch[0]))
        return two(lambda x: z, batch)  # type: ignore[arg-type]

    truth = GaussNewtonOperator.from_risk(EmpiricalRisk.from_batch_loss(mlp(), marked, data))
    assert error(A.to_dense(), truth.to_dense()) < EXACT
    sampled = FisherOperator.from_risk(EmpiricalRisk.from_batch_loss(mlp(), two, data), samples=500)
    v = random(43, seed=2)
    gap = abs(float(v @ (sampled @ v - A @ v)))
    assert gap < 4 * float(sampled.sampling_error(v))


# --- what there is none of ------------------------------------------------------------------------


def focal_of_torchs(z: Tensor, t: Tensor) -> Tensor:
    ce = F.cross_entropy(z, t, reduction="none")
    return ((1 - (-ce).exp()) ** 2 * ce).mean()


def of_scores(z: Tensor, t: Tensor) -> Tensor:
    return F.nll_loss(z, t)


NONE: dict[str, tuple[Any, Tensor, str]] = {
    "label smoothing": (*LOSSES["label smoothing"], "cross_entropy with label smoothing"),
    "pos_weight": (*LOSSES["bce with pos_weight"], "with_logits with pos_weight"),
    "huber": (*LOSSES["huber"], "huber_loss is not the negative log likelihood"),
    "focal": (focal, LABELS, "calls none of the loss functions of torch"),
    "focal of torch's": (focal_of_torchs, LABELS, "as a focal loss is"),
    "soft and weighted": (nn.CrossEntropyLoss(weight=WEIGHTS), SOFT, "that are probabilities"),
    "scores": (of_scores, LABELS, "log probabilities that add up to 1 but for"),
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("name", NONE)
def test_a_loss_that_is_no_likelihood_is_refused_with_the_reason(
    name: str, samples: int | None
) -> None:
    loss, targets, words = NONE[name]
    A = fisher(mlp(), loss, targets, samples=samples)
    for operator in (A, A.linearize()):
        with pytest.raises(ValueError, match=words):
            operator @ random(43)


def test_a_learned_variance_and_a_penalty_are_refused() -> None:
    def learned(z: Tensor, t: Tensor) -> Tensor:
        return F.gaussian_nll_loss(z[:, 0], t[:, 0], z[:, 1].exp())

    with pytest.raises(ValueError, match="a variance that depends on parameters"):
        fisher(mlp(), learned, REAL) @ random(43)
    with pytest.raises(ValueError, match=r"reaches 0\.weight, 0\.bias, 2\.weight past the outputs"):
        FisherOperator.from_risk(risk(penalized)) @ random(43)


# --- what an operator is besides ------------------------------------------------------------------


def test_it_has_blocks_checks_and_says_what_it_is() -> None:
    loss, targets = LOSSES["both"]
    A, truth = fisher(mlp(), loss, targets), whole(loss, targets)
    assert error(A.block("0.*", "2.*").to_dense(), truth[:25, 25:]) < EXACT
    assert A.check(batches=None).verdict == "healthy"
    assert repr(A) == "<43x43 FisherOperator float64 cpu>"
    drawn = fisher(mlp(), loss, targets, samples=8)
    assert drawn.check(batches=None).verdict == "healthy"
    assert repr(drawn) == "<43x43 FisherOperator(samples=8) float64 cpu>"
    assert repr(drawn.linearize()) == "<43x43 LinearizedFisher(samples=8) float64 cpu>"
    by_term = EmpiricalFisherOperator(mlp(), loss, split((X, targets), SIZES), per="term")
    assert repr(by_term) == "<43x43 EmpiricalFisherOperator(per='term') float64 cpu>"
    full = fisher(mlp(), loss, targets, mode="full")
    assert error(full.to_dense(), truth) < EXACT
