"""Gradients of samples are kept themselves where they are smaller than graphs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import EmpiricalFisherOperator, FisherOperator
from hvpop.curvature import linearized

from .problems import classes, error, random, set_parameters, split
from .test_gauss_newton import EXACT

X, LABELS = random(23, 1, 6, 6, seed=1), classes(23, seed=2)
IGNORED = LABELS.masked_fill(torch.arange(23) % 5 == 0, -100)
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
SIZES = (10, 9, 4)


def small() -> nn.Sequential:
    """Return a network of few parameters, which are used at many places."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2, groups=2, bias=False), nn.Tanh(),
        nn.Flatten(), nn.Unflatten(1, (9, 2)), nn.LayerNorm(2), nn.Linear(2, 3), nn.Softplus(),
        nn.AvgPool1d(3), nn.Flatten(), nn.Unflatten(1, (3, 3)),
    )  # fmt: skip


class Mean(nn.Module):
    """What ``small`` makes, in a mean over places; one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.twice = small(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.twice(torch.tanh(self.twice(self.body(x)))).mean(1)
        return result


class Places(Mean):
    """The same for each place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.body(x)).mT  # (N, 3, places)


def made(kind: Callable[[], nn.Module] = Mean) -> nn.Module:
    return set_parameters(kind().double())


def moment(model: nn.Module, loss: nn.Module, targets: Tensor) -> Tensor:
    """Return the mean of ``g g'`` over samples that count what a mean divides by."""
    parameters, total, weight = list(model.parameters()), torch.zeros(()), 0.0
    for x, y in zip(X.split(1), targets.split(1), strict=True):
        known = torch.where(
            y == -100, 0.0, loss.weight[y.clamp_min(0)] if loss.weight is not None else 1.0
        )
        if own := float(known.sum()):
            g = torch.autograd.grad(loss(model(x), y), parameters)
            flat = torch.cat([t.flatten() for t in g])
            total, weight = total + own * torch.outer(flat, flat), weight + own
    return total / weight


def used(E: Any, **options: Any) -> Any:
    """Return the linearized operator after so many products that it goes by rows."""
    A = E.linearize(**options)
    for _ in range(linearized.FORM_AFTER + 1):
        A @ random(E.shape[1])
    return A


@pytest.mark.parametrize("targets", [LABELS, IGNORED], ids=["all", "ignored"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), WEIGHTED], ids=["plain", "weighted"])
def test_rows_give_the_same_matrix_in_less_memory(loss: nn.Module, targets: Tensor) -> None:
    model = made()
    truth = moment(made(), loss, targets)
    E = EmpiricalFisherOperator(model, loss, split((X, targets), SIZES))
    graphs = E.linearize().report()
    A = used(E)
    rows = A.report()
    assert "rows formed" in rows.strategy
    assert "rows formed" not in graphs.strategy
    assert rows.bytes < graphs.bytes
    assert error(A.to_dense(), truth) < EXACT
    V = random(len(truth), 5)
    assert error(A @ V, truth @ V) < EXACT
    assert error(A @ V[:, 0], truth @ V[:, 0]) < EXACT
    n = sum(p.numel() for p in model.body.parameters())
    part = used(A.block("twice.*"))
    assert error(part.to_dense(), truth[n:, n:]) < EXACT
    for again in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert error(again @ V, truth @ V) < EXACT


def test_terms_of_which_a_sample_has_several_have_rows_of_their_own() -> None:
    targets = classes(23, 3, seed=5)
    targets[::4, 1] = -100
    E = EmpiricalFisherOperator(made(Places), WEIGHTED, split((X, targets), SIZES), per="term")
    A = used(E)
    assert "rows formed" in A.report().strategy
    V = random(E.shape[1], 3)
    assert error(A @ V, E @ V) < EXACT


def test_rows_larger_than_graphs_are_not_formed() -> None:
    data = split((random(23, 4), LABELS), SIZES)
    model = set_parameters(nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)).double())
    E = EmpiricalFisherOperator(model, nn.CrossEntropyLoss(), data)
    A = used(E)
    assert "rows formed" not in A.report().strategy
    assert A.report().bytes == E.linearize().report().bytes


def test_maps_without_room_have_room_as_rows() -> None:
    model = made()
    data = split((X.repeat(8, 1, 1, 1), LABELS.repeat(8)), [23] * 8)
    E = EmpiricalFisherOperator(model, nn.CrossEntropyLoss(), data)
    whole = E.linearize().report().bytes
    small, large = (used(E, memory=budget) for budget in (whole // 2, whole))
    assert E.linearize(memory=whole // 2).report().kept < 8 == small.report().kept
    assert small.report().bytes <= whole // 2
    V = random(E.shape[1], 3)
    assert error(small @ V, E @ V) < EXACT
    assert error(large @ V, E @ V) < EXACT


class Alone(Mean):
    """Makes something else of a sample that is by itself, or nothing."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self.refuses:
            raise RuntimeError("one is not enough")
        result: Tensor = super().forward(x)
        return 2 * result if len(x) == 1 else result


@pytest.mark.parametrize("refuses", [True, False])
def test_what_is_not_the_same_sample_by_sample_is_not_formed(refuses: bool) -> None:
    E = EmpiricalFisherOperator(
        made(lambda: Alone(refuses)), nn.CrossEntropyLoss(), split((X, LABELS), SIZES)
    )
    A, v = used(E), random(E.shape[1])
    assert "rows formed" not in A.report().strategy
    assert error(A @ v, E @ v) < EXACT


def test_the_same_calls_give_the_same_bits_and_rows_are_traced_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linearized, "TRACE_AFTER", 6)
    E = EmpiricalFisherOperator(small_mean(), nn.CrossEntropyLoss(), split((X, LABELS), SIZES))
    found, v = [], random(E.shape[1], seed=9)
    for _ in range(2):
        A = E.linearize()
        found.append(torch.stack([A @ v for _ in range(9)]))
        assert "rows formed" in A.report().strategy
    assert torch.equal(*found)
    assert error(found[0][-1], E @ v) < EXACT


def small_mean() -> nn.Module:
    """Return a model of ordinary layers only."""
    return set_parameters(
        nn.Sequential(*small()[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    )


def test_draws_of_targets_go_by_graphs() -> None:
    E = FisherOperator(made(), nn.CrossEntropyLoss(), split((X, LABELS), SIZES), samples=2)
    A, v = used(E), random(E.shape[1])
    assert error(A @ v, E @ v) < EXACT
