"""Maps that are used much get traced, and traces serve again at the next point."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hvpop import Compiled, HessianOperator, ReverseOverReverse
from hvpop.curvature import linearized
from hvpop.strategies.compiling import program

from .problems import classes, error, mlp, random

BATCHES = [(random(n, 4, seed=n), classes(n, seed=n)) for n in (9, 9, 5)]
V = random(43, 20, seed=3)
ROUNDING = 1e-12  # relative, of sums over 23 samples in float64


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearized, "TRACE_AFTER", 4)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    whole = program.Program.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        whole(self, *args, **kwargs)

    monkeypatch.setattr(program.Program, "__init__", counted)
    return made


def operator(model: nn.Module | None = None, **options: Any) -> HessianOperator:
    return HessianOperator(model or mlp(), nn.CrossEntropyLoss(), BATCHES, **options)


def test_much_used_maps_are_traced_and_products_stay_the_same(traces: list[Any]) -> None:
    H = operator()
    A, truth = H.linearize(), H @ V
    for v in V.T[:4]:
        A @ v
    assert traces == []
    assert "traced" not in A.report().strategy
    assert error(A @ V, truth) < ROUNDING
    assert error(A @ V[:, 0], truth[:, 0]) < ROUNDING
    assert len(traces) == 1
    assert "traced" in A.report().strategy
    assert A.report().kept == 3


def test_where_nothing_is_kept_nothing_is_traced_and_the_report_says_so(traces: list[Any]) -> None:
    A = operator().linearize(memory=0)
    for v in V.T[:6]:
        A @ v
    assert traces == []
    assert "traced" not in A.report().strategy


def test_a_trace_serves_again_after_a_training_step(traces: list[Any]) -> None:
    model = mlp()
    H = operator(model)
    for _ in range(3):
        A = H.linearize()
        A @ V
        assert error(A @ V, H @ V) < ROUNDING
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.sin()
    assert len(traces) == 1


def test_compiled_traces_once_for_all_points_and_anew_for_another_model(
    traces: list[Any],
) -> None:
    model = nn.Sequential(*mlp(), nn.Softplus(beta=2.0))
    H = operator(model, strategy=Compiled(compiler=False))
    for beta in (2.0, 2.0, 5.0):
        model[3].beta = beta  # a number in the graph, not a tensor that it reads
        A = H.linearize()
        live = operator(model, strategy=ReverseOverReverse())
        assert error(A @ V, live @ V) < ROUNDING
        with torch.no_grad():
            model[0].weight.mul_(1.1)
    assert len(traces) == 2


def test_a_strategy_that_was_asked_for_stays(traces: list[Any]) -> None:
    A = operator(strategy=ReverseOverReverse()).linearize()
    for _ in range(3):
        A @ V
    assert traces == []


class Custom(nn.Sequential):
    pass


def test_models_with_code_of_their_own_are_not_traced(traces: list[Any]) -> None:
    """A trace would run that code on tensors without values, which it may put somewhere."""
    A = operator(Custom(*mlp())).linearize()
    for _ in range(3):
        A @ V
    assert traces == []


def test_what_cannot_be_traced_goes_on_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(program, "trace", refuse)
    H = operator()
    A, truth = H.linearize(), H @ V
    for _ in range(3):
        assert error(A @ V, truth) < ROUNDING
    assert A.report().kept == 3


def test_traced_maps_stay_within_the_budget() -> None:
    for memory in (0, 3000, 10_000, 100_000):
        H = operator()
        A, truth = H.linearize(memory=memory), H @ V
        kept = A.report().kept
        for _ in range(3):
            assert error(A @ V, truth) < ROUNDING
        assert A.report().bytes <= max(memory, 8 * A.shape[0])  # the point is kept in any case
        assert A.report().kept == kept  # a trace that does not fit leaves the map as it was


def test_copies_of_what_was_traced_work(traces: list[Any]) -> None:
    H = operator()
    A = H.linearize()
    A @ V
    A @ V
    for copied in (copy.deepcopy(A), pickle.loads(pickle.dumps(A)), pickle.loads(pickle.dumps(H))):
        assert error(copied @ V, A @ V) < ROUNDING
