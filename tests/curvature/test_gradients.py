"""Rows are the gradients of samples and terms; their second moment is the empirical Fisher matrix."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import lsmr, svds
from torch import Tensor, nn

from hvpop import (
    BATCHES,
    TOTAL,
    Average,
    Diagonal,
    EmpiricalFisherOperator,
    EmpiricalRisk,
    GradientOperator,
    Identity,
    outputs,
)
from hvpop.risk import hugging_face

from .problems import classes, error, mlp, random, set_parameters, split
from .test_gauss_newton import (
    EXACT,
    IGNORED,
    LABELS,
    LOSSES,
    MODELS,
    REAL,
    SIZES,
    STRATEGIES,
    Headed,
    X,
    normed,
    penalized,
    risk,
    unmarked,
)

Rows = tuple[Tensor, Tensor]  # gradients (N, n); what they count, (N,)


def flat(model: nn.Module, value: Tensor) -> Tensor:
    """Return the gradient of a number as one vector."""
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients])


def counts(loss: nn.Module, target: Tensor) -> float:
    """Return what a mean loss divides by, of one term."""
    if target.is_floating_point():
        return 1.0
    weight = getattr(loss, "weight", None)
    known = 1.0 if weight is None else float(weight[target.clamp_min(0)])
    return known * float(target != -100)


def samples(model: nn.Module, loss: nn.Module, targets: Tensor, x: Tensor = X) -> Rows:
    """Return the gradient of each sample's own loss, and what a mean over samples divides by."""
    rows, weights = [], []
    for one, t in zip(x.split(1), targets.split(1), strict=True):
        weight = sum(counts(loss, e) for e in t.reshape(-1))
        value = loss(model(one), t) if weight else 0.0 * model(one).sum()
        rows.append(flat(model, value))
        weights.append(weight)
    return torch.stack(rows), torch.tensor(weights, dtype=torch.float64)


def moment(rows: Rows) -> Tensor:
    """Return the weighted mean of ``g g'``."""
    G, w = rows
    return G.mT @ (w[:, None] * G) / w.sum()


def both(model: nn.Module, loss: Any, targets: Tensor, sizes: Any = SIZES, **options: Any) -> Any:
    data = split((X, targets), sizes)
    return (
        EmpiricalFisherOperator(model, loss, data, **options),
        GradientOperator(model, loss, data, **options),
    )


# --- the matrices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", LOSSES)
def test_rows_are_the_gradients_of_samples_by_themselves(name: str, kind: str) -> None:
    model, (loss, targets) = MODELS[kind](), LOSSES[name]
    truth = samples(MODELS[kind](), loss, targets)
    E, G = both(model, loss, targets)
    assert error(G.to_dense(), truth[0]) < EXACT
    assert error(G.linearize().to_dense(), truth[0]) < EXACT
    assert error(G.weights, truth[1] / truth[1].sum()) < EXACT
    assert error(E.to_dense(), moment(truth)) < EXACT
    assert error(E.linearize().to_dense(), moment(truth)) < EXACT
    values = torch.linalg.eigvalsh(E.to_dense())
    assert values[0] > -EXACT * values[-1]


@pytest.mark.parametrize("name", LOSSES)
def test_rows_add_up_to_the_gradient_and_their_second_moment_is_the_fisher(name: str) -> None:
    model, (loss, targets) = mlp(), LOSSES[name]
    E, G = both(model, loss, targets)
    assert error(G.T @ G.weights, flat(model, loss(model(X), targets))) < EXACT
    V = random(43, 3, seed=5)
    assert error(G.T @ Diagonal(G.weights) @ G @ V, E @ V) < EXACT
    kept = G.linearize()
    assert error(kept.T @ Diagonal(kept.weights) @ kept @ V, E.linearize() @ V) < EXACT


@STRATEGIES
@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize("per", ["sample", "term"])
def test_every_strategy_gives_them(
    strategy: Any, tolerance: float, linearized: bool, per: str
) -> None:
    loss, targets = LOSSES["both"]
    truth = samples(normed(), loss, targets)  # of which each has one term
    E, G = both(normed(), loss, targets, strategy=copy.copy(strategy), per=per)
    if linearized:
        E, G = E.linearize(), G.linearize()
    V, U = random(E.shape[1], 9, seed=5), random(23, 9, seed=6)
    assert error(E @ V, moment(truth) @ V) < tolerance
    assert error(G @ V, truth[0] @ V) < tolerance
    assert error(G @ V[:, 0], truth[0] @ V[:, 0]) < tolerance
    assert error(G.T @ U, truth[0].mT @ U) < EXACT
    assert error(G.T @ U[:, 0], truth[0].mT @ U[:, 0]) < EXACT


@given(
    cuts=st.lists(st.integers(1, 22), max_size=6, unique=True),
    name=st.sampled_from([*LOSSES]),
    per=st.sampled_from(["sample", "term"]),
)
def test_no_split_into_batches_changes_them(cuts: list[int], name: str, per: str) -> None:
    sizes = [b - a for a, b in pairwise([0, *sorted(cuts), 23])]
    model, (loss, targets) = mlp(), LOSSES[name]
    v = random(43, seed=6)
    whole = both(model, loss, targets, [23], per=per)
    parts = both(model, loss, targets, sizes, per=per)
    for one, other in zip(parts, whole, strict=True):
        assert error(one @ v, other @ v) < EXACT
        assert error(one.linearize() @ v, other @ v) < EXACT
    assert error(parts[1].weights, whole[1].weights) < EXACT


# --- what a term is -------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Classes for each of seven places of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 3, 3, padding=1), nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x[:, None])))
        return result  # (N, classes, places)


TEXT = random(9, 7, seed=11)
TAGS = classes(9, 7, of=4, seed=12).masked_fill(random(9, 7, seed=13) > 0.8, -100)
BY_TAG = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)


def tagger() -> nn.Module:
    return set_parameters(Tagger().double())


def tokens(model: nn.Module, loss: nn.Module) -> Rows:
    """Return the gradient of each token's own loss, by sequence."""
    rows, weights = [], []
    for i in range(9):
        for j in range(7):
            value, weight = model(TEXT[i : i + 1])[:, :, j], counts(loss, TAGS[i, j])
            rows.append(flat(model, loss(value, TAGS[i : i + 1, j]) if weight else 0 * value.sum()))
            weights.append(weight)
    return torch.stack(rows), torch.tensor(weights, dtype=torch.float64)


def flattened(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.movedim(1, -1).flatten(0, 1), t.flatten(), weight=BY_TAG)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [[9], [4, 4, 1], [2, 7]])
def test_tokens_and_sequences_are_different_matrices(sizes: list[int], weighted: bool) -> None:
    loss = nn.CrossEntropyLoss(weight=BY_TAG if weighted else None)
    data = split((TEXT, TAGS), sizes)
    truths = {"sample": samples(tagger(), loss, TAGS, TEXT), "term": tokens(tagger(), loss)}
    for per, truth in truths.items():
        E = EmpiricalFisherOperator(tagger(), loss, data, per=per)  # type: ignore[arg-type]
        G = GradientOperator(tagger(), loss, data, per=per)  # type: ignore[arg-type]
        assert error(E.to_dense(), moment(truth)) < EXACT
        assert error(E.linearize().to_dense(), moment(truth)) < EXACT
        assert G.shape == (len(truth[1]), truth[0].shape[1])
        assert error(G.to_dense(), truth[0]) < EXACT
        assert error(G.weights, truth[1] / truth[1].sum()) < EXACT
    assert error(moment(truths["term"]), moment(truths["sample"])) > 0.1


def test_terms_are_found_behind_reshapes_of_a_users() -> None:
    data = split((TEXT, TAGS), [4, 5])
    loss = nn.CrossEntropyLoss(weight=BY_TAG)
    average = Average(weight=lambda batch: float(BY_TAG[batch[1][batch[1] >= 0]].sum()))
    truths = {"sample": samples(tagger(), loss, TAGS, TEXT), "term": tokens(tagger(), loss)}
    for per, truth in truths.items():
        E = EmpiricalFisherOperator(
            tagger(),
            flattened,
            data,
            per=per,  # type: ignore[arg-type]
            average=average,
        )
        assert error(E.to_dense(), moment(truth)) < EXACT


def test_entries_and_samples_of_squares_are_different_matrices() -> None:
    E, G = both(mlp(), nn.MSELoss(), REAL, per="term")
    model = mlp()
    entries = [flat(model, (model(X)[i, j] - REAL[i, j]) ** 2) for i in range(23) for j in range(3)]
    truth = torch.stack(entries), torch.ones(69, dtype=torch.float64)
    assert error(G.to_dense(), truth[0]) < EXACT
    assert error(E.to_dense(), moment(truth)) < EXACT
    assert error(both(mlp(), nn.MSELoss(), REAL)[0].to_dense(), moment(truth)) > 0.1


ENTRIES = random(23, 3, seed=14).abs() + 0.1


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss])
def test_entries_count_what_their_loss_divides_by(loss: Any) -> None:
    def weighted(z: Tensor, t: tuple[Tensor, Tensor]) -> Tensor:
        value: Tensor = loss(z, t[0], weight=t[1])
        return value

    whole = [(X, (REAL, ENTRIES))]
    E = EmpiricalFisherOperator(mlp(), weighted, whole, per="term")
    G = GradientOperator(mlp(), weighted, whole, per="term")
    model = mlp()
    own = loss(model(X), REAL, reduction="none")
    if loss is F.huber_loss:  # which divides by the number of entries
        own, counts = own * ENTRIES, torch.ones_like(ENTRIES)
    else:
        counts = ENTRIES
    rows = [torch.autograd.grad(e, list(model.parameters()), retain_graph=True)
            for e in own.flatten()]  # fmt: skip
    truth = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    assert error(G.to_dense(), truth) < EXACT
    assert error(E.to_dense(), moment((truth, counts.flatten()))) < EXACT


def focal(z: Tensor, t: Tensor) -> Tensor:
    p = z.log_softmax(1).gather(1, t[:, None])
    return -((1 - p.exp()) ** 2 * p).mean()


def test_a_loss_written_out_is_a_mean_over_samples_or_has_no_terms() -> None:
    E, G = both(mlp(), focal, LABELS)
    model = mlp()
    rows = [
        flat(model, focal(model(x), t)) for x, t in zip(X.split(1), LABELS.split(1), strict=True)
    ]
    truth = torch.stack(rows), torch.ones(23, dtype=torch.float64)
    assert error(G.to_dense(), truth[0]) < EXACT
    assert error(E.to_dense(), moment(truth)) < EXACT
    with pytest.raises(ValueError, match="calls none of the loss functions of torch"):
        both(mlp(), focal, LABELS, per="term")[0] @ random(43)


@pytest.mark.parametrize("sizes", [[23], SIZES, [1, 22]])
def test_of_a_sum_rows_are_what_it_adds_up(sizes: Any) -> None:
    def summed(z: Tensor, t: Tensor) -> Tensor:
        return ((z - t) ** 2).sum()

    truth, _ = samples(mlp(), nn.MSELoss(reduction="sum"), REAL)
    for loss in (summed, nn.MSELoss(reduction="sum")):
        E, G = both(mlp(), loss, REAL, sizes, average=TOTAL)
        assert error(G.to_dense(), truth) < EXACT
        assert error(G.weights, torch.ones(23)) < EXACT
        assert error(E.to_dense(), truth.mT @ truth) < EXACT


def test_batches_that_count_alike_share_what_they_count_among_their_samples() -> None:
    loss, targets = LOSSES["both"]
    truth, weights = samples(mlp(), loss, targets)
    E, G = both(mlp(), loss, targets, average=BATCHES)
    share = torch.cat([w / w.sum() / len(SIZES) for w in weights.split(SIZES)])
    assert error(G.weights, share) < EXACT
    assert error(E.to_dense(), truth.mT @ (share[:, None] * truth)) < EXACT


def test_a_batch_that_counts_nothing_has_rows_of_zeros() -> None:
    targets = LABELS.clone()
    targets[10:19] = -100
    loss = nn.CrossEntropyLoss()
    truth = samples(mlp(), loss, targets)
    E, G = both(mlp(), loss, targets)
    assert error(G.to_dense(), truth[0]) < EXACT
    assert error(G.linearize().T @ random(23), truth[0].mT @ random(23)) < EXACT
    assert error(G.weights, truth[1] / truth[1].sum()) < EXACT
    assert error(E.to_dense(), moment(truth)) < EXACT


def test_a_batch_loss_and_the_head_of_a_model_have_them() -> None:
    def marked(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(outputs(model(batch[0])), batch[1])

    truth = samples(mlp(), nn.CrossEntropyLoss(), LABELS)
    for per in ("sample", "term"):
        G = GradientOperator.from_risk(risk(marked), per=per)
        assert error(G.to_dense(), truth[0]) < EXACT
        E = EmpiricalFisherOperator.from_risk(risk(marked), per=per)
        assert error(E.to_dense(), moment(truth)) < EXACT
    truth = samples(mlp(), nn.CrossEntropyLoss(), IGNORED)
    data = [{"x": x, "labels": t} for x, t in split((X, IGNORED), SIZES)]
    for per in ("sample", "term"):
        E = EmpiricalFisherOperator.from_risk(
            EmpiricalRisk.from_batch_loss(Headed(), hugging_face(), data), per=per
        )
        assert error(E.to_dense(), moment(truth)) < EXACT


class Robust(nn.Module):
    """Calls a loss function on its way, and one for the record."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        with torch.no_grad():
            self.record = F.mse_loss(z, torch.zeros_like(z))
        return z + F.smooth_l1_loss(z, z.sin(), reduction="none")


@pytest.mark.parametrize("name", ["both", "mse"])
def test_calls_that_are_not_the_losss_own_are_told_apart(name: str) -> None:
    loss, targets = LOSSES[name]
    truth = samples(Robust(), loss, targets)
    E, G = both(Robust(), loss, targets)
    assert error(G.to_dense(), truth[0]) < EXACT
    assert error(E.to_dense(), moment(truth)) < EXACT


def test_a_loss_for_the_record_is_no_term() -> None:
    def recorded(z: Tensor, t: Tensor) -> Tensor:
        F.mse_loss(z, torch.zeros_like(z))
        return 2.0 * F.cross_entropy(z, t)

    rows, weights = samples(mlp(), nn.CrossEntropyLoss(), LABELS)
    for per in ("sample", "term"):
        assert error(both(mlp(), recorded, LABELS, per=per)[1].to_dense(), 2 * rows) < EXACT
        E = both(mlp(), recorded, LABELS, per=per)[0]
        assert error(E.to_dense(), 4 * moment((rows, weights))) < EXACT


@pytest.mark.parametrize("sizes", [[23], SIZES])
def test_a_mask_of_a_users_counts_as_ignored_targets_do(sizes: Any) -> None:
    def masked(z: Tensor, t: Tensor) -> Tensor:
        mask = (t >= 0).double()
        return (F.cross_entropy(z, t.clamp_min(0), reduction="none") * mask).sum() / mask.sum()

    truth = samples(mlp(), nn.CrossEntropyLoss(), IGNORED)
    average = Average(weight=lambda batch: float((batch[1] >= 0).sum()))
    for per in ("sample", "term"):
        E, G = both(mlp(), masked, IGNORED, sizes, per=per, average=average)
        assert error(G.to_dense(), truth[0]) < EXACT
        assert error(E.to_dense(), moment(truth)) < EXACT


def test_what_an_ignored_target_leaves_in_the_loss_is_not_dropped() -> None:
    def pulled(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + z.square().mean()

    targets = LABELS[:20].clone()
    targets[[3, 14]] = -100  # one in each half
    for kind in (EmpiricalFisherOperator, GradientOperator):
        A = kind(mlp(), pulled, [(X[:20], targets)])
        with pytest.raises(ValueError, match="neither a mean nor a sum over them"):
            A @ random(43)


# --- what is refused ------------------------------------------------------------------------------


def normalized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return set_parameters(model.double())


def contrastive(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z @ z.mT, torch.arange(len(z)))


def dropped() -> nn.Module:
    return set_parameters(
        nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    )


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize(
    ("build", "loss", "words"),
    [
        (normalized, nn.CrossEntropyLoss(), "samples see each other"),
        (mlp, contrastive, "samples see each other"),
        (dropped, nn.CrossEntropyLoss(), "draws random numbers"),
    ],
    ids=["batch norm", "contrastive", "dropout"],
)
def test_samples_that_are_not_by_themselves_are_refused(
    build: Callable[[], nn.Module], loss: Any, words: str, linearized: bool
) -> None:
    for operator in both(build(), loss, LABELS, [23]):
        A = operator.linearize() if linearized else operator
        with pytest.raises(ValueError, match=words):
            A @ random(A.shape[1])


def test_what_is_proven_is_proven_again_when_a_mode_has_changed() -> None:
    model = normalized().eval()
    E, G = both(model, nn.MSELoss(), REAL)
    truth = samples(model, nn.MSELoss(), REAL)
    assert error(E.to_dense(), moment(truth)) < EXACT
    model.train()
    for operator in (E, G):
        with pytest.raises(ValueError, match="samples see each other"):
            operator @ random(operator.shape[1])
    model.eval()
    assert error(E.to_dense(), moment(truth)) < EXACT
    assert error(G.to_dense(), truth[0]) < EXACT


@pytest.mark.parametrize(
    ("batch_loss", "words"),
    [
        (unmarked, r"loss\(hvpop\.outputs\(model\(x\)\), y\)"),
        (penalized, "reaches 0.weight, 0.bias, 2.weight past the outputs"),
    ],
)
def test_what_cannot_be_parted_is_told(batch_loss: Any, words: str) -> None:
    E = EmpiricalFisherOperator.from_risk(risk(batch_loss))
    with pytest.raises(ValueError, match=words):
        E @ random(43)


def test_per_is_a_sample_or_a_term() -> None:
    for kind in (EmpiricalFisherOperator, GradientOperator):
        with pytest.raises(ValueError, match="per must be 'sample' or 'term', got 'token'"):
            kind(mlp(), nn.MSELoss(), [(X, REAL)], per="token")  # type: ignore[arg-type]


# --- what an operator is besides ------------------------------------------------------------------


def test_the_fisher_has_blocks_checks_and_a_linearized_form() -> None:
    loss, targets = LOSSES["both"]
    truth = moment(samples(mlp(), loss, targets))
    E, _ = both(mlp(), loss, targets)
    rows, cols = slice(0, 25), slice(25, 43)
    assert error(E.block("0.*").to_dense(), truth[rows, rows]) < EXACT
    assert error(E.block("0.*", "2.*").to_dense(), truth[rows, cols]) < EXACT
    assert error(both(mlp(), loss, targets, params="2.*")[0].to_dense(), truth[cols, cols]) < EXACT
    assert E.check(batches=None).verdict == "healthy"
    A = E.linearize()
    assert repr(E) == "<43x43 EmpiricalFisherOperator float64 cpu>"
    assert repr(A) == "<43x43 LinearizedEmpiricalFisher float64 cpu>"
    v = random(43)
    assert error((A + 0.1 * Identity.like(A)) @ v, truth @ v + 0.1 * v) < EXACT
    full = EmpiricalFisherOperator(mlp(), loss, split((X, targets), SIZES), mode="full")
    assert error(full @ v, truth @ v) < EXACT


def test_rows_are_a_matrix_for_scipy_with_columns_by_name() -> None:
    loss, targets = LOSSES["cross entropy"]
    truth, _ = samples(mlp(), loss, targets)
    _, G = both(mlp(), loss, targets)
    A = G.linearize()
    assert repr(G) == "<23x43 GradientOperator float64 cpu>"
    assert repr(A) == "<23x43 LinearizedGradient float64 cpu>"
    assert A.linearize() is A
    largest = torch.linalg.svdvals(truth)[:3]
    assert error(np.sort(svds(A, k=3, return_singular_vectors=False))[::-1].copy(), largest) < 1e-9
    b = random(23, seed=7).numpy()
    x = lsmr(A, b, damp=0.3, atol=1e-13, btol=1e-13, maxiter=400)[0]
    T = truth.numpy()
    expected = np.linalg.solve(T.T @ T + 0.09 * np.eye(43), T.T @ b)
    assert error(x, expected) < 1e-9
    for operator in (G, A):
        head = operator.block("2.*")
        assert head.layout.names == ("2.weight", "2.bias")
        assert error(head.to_dense(), truth[:, 25:]) < EXACT
    assert "3 batches, maps of 3 kept" in str(A.report())


@pytest.mark.parametrize("memory", ["1GiB", 4000, 0])
def test_what_does_not_fit_is_made_again(memory: Any) -> None:
    loss, targets = LOSSES["cross entropy"]
    truth, _ = samples(mlp(), loss, targets)
    _, G = both(mlp(), loss, targets)
    A = G.linearize(memory=memory)
    V, U = random(43, 3), random(23, 3)
    assert error(A @ V, truth @ V) < EXACT
    assert error(A.T @ U, truth.mT @ U) < EXACT


def test_a_linearized_one_keeps_its_point_and_is_copied() -> None:
    model, (loss, targets) = mlp(), LOSSES["cross entropy"]
    _, G = both(model, loss, targets)
    A, v = G.linearize(), random(43, seed=8)
    expected = A @ v
    assert A.is_current()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert not A.is_current()
    assert torch.equal(A @ v, expected)
    assert error(G @ v, samples(model, loss, targets)[0] @ v) < EXACT
    assert error(pickle.loads(pickle.dumps(A)) @ v, expected) < EXACT
    model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="parameters changed since the operator was built"):
        G @ v


def test_the_matrix_itself_is_made_by_rows_or_by_columns() -> None:
    loss, targets = LOSSES["both"]
    truth, _ = samples(mlp(), loss, targets)
    passes = 0

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            nonlocal passes
            passes += 1
            return super().__iter__()

    G = GradientOperator(mlp(), loss, Counted(split((X, targets), SIZES)))
    passes = 0
    assert error(G.to_dense(), truth) < EXACT  # 23 rows, 43 columns
    assert passes == 1
    head = G.block("2.bias")  # 3 columns
    assert error(head.to_dense(), truth[:, 40:]) < EXACT
    assert error(G.linearize().block("2.bias").to_dense(), truth[:, 40:]) < EXACT
    many = GradientOperator(mlp(), nn.MSELoss(), [(X.repeat(9, 1), REAL.repeat(9, 1))])
    wide = GradientOperator(mlp(hidden=60), nn.MSELoss(), [(X.repeat(9, 1), REAL.repeat(9, 1))])
    for operator in (many, wide):  # 207 rows against 43 and 483 columns
        unit = torch.eye(207, dtype=torch.float64)
        assert error(operator.to_dense(), (operator.T @ unit).mT) < EXACT


def test_a_batch_that_has_grown_is_noticed() -> None:
    data = [[X, REAL]]
    G = GradientOperator(mlp(), nn.MSELoss(), data)
    data[0][:] = X[:20], REAL[:20]
    with pytest.raises(
        RuntimeError, match="a batch had 23 rows when the operator was built, and has 20"
    ):
        G @ random(43)


def test_a_number_that_is_none_is_told_with_its_row() -> None:
    x = X.clone()
    x[7] = torch.nan
    G = GradientOperator(mlp(), nn.MSELoss(), split((x, REAL), [1] * 23))
    with pytest.raises(FloatingPointError, match="not finite, first in row 7"):
        G @ random(43)


def test_nothing_of_the_users_changes() -> None:
    model, (loss, targets) = mlp(), LOSSES["both"]
    loss(model(X), targets).backward()
    before = [(p.detach().clone(), copy.copy(p.grad)) for p in model.parameters()]
    state = torch.get_rng_state()
    for operator in both(model, loss, targets):
        operator @ random(43)
        operator.linearize() @ random(43)
    assert all(
        torch.equal(p, q) and p.grad is not None and torch.equal(p.grad, g)
        for p, (q, g) in zip(model.parameters(), before, strict=True)
        if g is not None
    )
    assert torch.equal(state, torch.get_rng_state())


def averaged_by_hand(z: Tensor, y: Tensor) -> Tensor:
    kept = (y != -100).to(z)
    own = z.logsumexp(1) - z.gather(1, y.clamp_min(0)[:, None])[:, 0]
    return (own * kept).sum() / kept.sum().clamp_min(1)


def averaged_by_a_count(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum", ignore_index=-100) / (y != -100).sum()


@pytest.mark.parametrize("loss", [averaged_by_hand, averaged_by_a_count])
@pytest.mark.parametrize("linearized", [False, True])
def test_a_law_that_holds_of_the_first_batch_is_seen_to_hold_of_others(
    loss: Any, linearized: bool
) -> None:
    model, labels = nn.Linear(3, 4).double(), classes(20, of=4)
    labels[12:17] = -100  # the first batch has all of its targets
    data = split((random(20, 3), labels), [10, 10])
    for kind in (EmpiricalFisherOperator, GradientOperator):
        matrix: Any = kind(model, loss, data, average=BATCHES)
        with pytest.raises(ValueError, match="samples' own"):
            (matrix.linearize() if linearized else matrix) @ random(16)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_weights_of_samples_that_are_all_one_in_the_first_batch_stay_what_they_are(
    scale: float,
) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return scale * (F.cross_entropy(z, y[:, 0].long(), reduction="none") * y[:, 1]).mean()

    weights = random(20, seed=3).abs()
    weights[:7] = 1
    targets = torch.stack([classes(20, of=4).double(), weights], 1)
    model, X = nn.Linear(3, 4).double(), random(20, 3)
    G = GradientOperator(model, loss, split((X, targets), [7, 8, 5]))
    own = [flat(model, loss(model(X[i : i + 1]), targets[i : i + 1])) for i in range(20)]
    torch.testing.assert_close(G.to_dense(), torch.stack(own), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(G.weights, torch.full((20,), 1 / 20, dtype=torch.float64))


def test_rows_of_a_fit_that_leaves_little_are_compared_with_their_own_rounding() -> None:
    model, X = nn.Linear(3, 4), random(18, 3).float()
    with torch.no_grad():
        model.weight.mul_(30)
        labels = model(X).argmax(1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()

    G = GradientOperator(model, loss, split((X, labels), [7, 6, 5]))
    exact = copy.deepcopy(model).double()
    truth = GradientOperator(exact, nn.CrossEntropyLoss(), [(X.double(), labels)]).to_dense()
    assert error(G.to_dense().double(), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [10, 100, 1000])
def test_samples_of_which_nothing_but_rounding_is_left_are_not_taken_for_coupled(
    scale: float, dtype: torch.dtype
) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()

    for seed in range(8):
        model = nn.Linear(3, 4).to(dtype)
        n = 5 + 3 * seed
        with torch.no_grad():
            model.weight.copy_(scale * random(4, 3, seed=seed))
            x = random(n, 3, seed=seed + 20).to(dtype)
            y = model(x).argmax(1)
        F = EmpiricalFisherOperator(model, loss, [(x, y)])
        assert (F @ torch.ones(16, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("sizes", [[0, 5, 7], [5, 0, 7], [5, 7, 0]])
@pytest.mark.parametrize("per", ["sample", "term"])
def test_a_batch_of_no_samples_has_no_rows(sizes: list[int], per: Any) -> None:
    model, X, y = nn.Linear(3, 4).double(), random(12, 3), classes(12, of=4)
    for loss, targets in ((nn.CrossEntropyLoss(), y), (nn.MSELoss(), random(12, 4, seed=2))):
        whole = GradientOperator(model, loss, [(X, targets)], per=per)
        ragged = GradientOperator(model, loss, split((X, targets), sizes), per=per)
        assert ragged.shape == whole.shape
        for one in (ragged, ragged.linearize()):
            assert error(one.to_dense(), whole.to_dense()) < 1e-14
            u = random(whole.shape[0], seed=5)
            assert error(one.T @ u, whole.T @ u) < 1e-14
        torch.testing.assert_close(ragged.weights, whole.weights)


class Squeezed(nn.Module):
    """Of one sample it gives a number, and no vector of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze()


@pytest.mark.parametrize("sizes", [[12], [5, 7], [4, 6, 2], [3, 9]])
@pytest.mark.parametrize("loss", [nn.MSELoss(), lambda z, y: (z - y).square().mean()])
def test_a_model_that_squeezes_has_rows(loss: Any, sizes: list[int]) -> None:
    model, X, y = Squeezed().double(), random(12, 3), random(12, seed=1)
    own = [flat(model, (model(X[i]) - y[i]).square()) for i in range(12)]
    G = GradientOperator(model, loss, split((X, y), sizes))
    for one in (G, G.linearize()):
        assert error(one.to_dense(), torch.stack(own)) < 1e-12


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch's, of that sample
def test_a_last_batch_of_one_that_is_squeezed_has_a_row() -> None:
    model, X, y = Squeezed().double(), random(12, 3), random(12, seed=1)
    whole = GradientOperator(model, nn.MSELoss(), [(X, y)])
    ragged = GradientOperator(model, nn.MSELoss(), split((X, y), [5, 6, 1]))
    assert error(ragged.to_dense(), whole.to_dense()) < 1e-12


def test_a_vector_or_parameter_that_is_no_number_is_named() -> None:
    model = mlp()
    G = GradientOperator(model, nn.MSELoss(), split((X, REAL), [1] * 23))
    with pytest.raises(FloatingPointError, match="not finite; the vector it multiplies is not"):
        G @ torch.full_like(random(43), torch.nan)
    with pytest.raises(FloatingPointError, match="not finite; the vector it multiplies is not"):
        G.T @ torch.full((23,), torch.inf, dtype=X.dtype)
    name, parameter = next(iter(model.named_parameters()))
    parameter.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"not finite; parameter {name} is not"):
        G @ random(43)


def test_terms_that_are_added_up_and_divided_by_samples_count_a_sample_s_share() -> None:
    model, X, y = nn.Linear(3, 4).double(), random(12, 3), random(12, 4, seed=1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y, reduction="sum") / len(y)

    own = [flat(model, (model(X) - y).square().reshape(-1)[i]) for i in range(48)]
    for sizes in ([12], [5, 7]):
        F_ = EmpiricalFisherOperator(model, loss, split((X, y), sizes), per="term")
        assert error(F_.to_dense(), sum(torch.outer(g, g) for g in own) / 12) < 1e-12
