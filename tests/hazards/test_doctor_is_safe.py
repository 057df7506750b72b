"""The doctor calls healthy models healthy, raises nothing, and changes nothing of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import (
    Average,
    FiniteDifference,
    ForwardOverReverse,
    HessianOperator,
)
from tests.zoo.registry import Problem
from tests.zoo.untouched import leave_gradients, same, seen_of_the_user

from .problems import Apply, labelled, mlp, random, vector
from .sick import Reentrant, around, layer_norm, operator, scripted, weight_normed

LOSS = nn.CrossEntropyLoss()


def large_relu() -> HessianOperator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        model.append(nn.Linear(64, 3))
    return HessianOperator(model, LOSS, [(random(64, 20, dtype=torch.float32), labelled(64)[1])])


def recurrent() -> HessianOperator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lstm = nn.LSTM(4, 5, batch_first=True)
    model = nn.Sequential(lstm, Apply(lambda out: out[0][:, -1]), nn.Linear(5, 3))
    data = [(random(5, 6, 4, dtype=torch.float32), labelled(5)[1])]
    return HessianOperator(model, LOSS, data)


def attentive() -> HessianOperator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64)
    model = nn.Sequential(layer, Apply(lambda h: h.mean(1)), mlp())
    return HessianOperator(model, LOSS, [(random(5, 6, 4), labelled(5)[1])])


def halved() -> HessianOperator:
    x, y = labelled()
    with pytest.warns(UserWarning, match="two or three digits"):
        return HessianOperator(mlp().bfloat16(), LOSS, [(x.bfloat16(), y)])


HEALTHY: dict[str, Callable[[], HessianOperator]] = {
    "mlp": lambda: operator(mlp()),
    "full": lambda: operator(mlp(), mode="full"),
    "part": lambda: operator(mlp(), params="2.*"),
    "relu float32": large_relu,
    "lstm float32": recurrent,
    "bfloat16": halved,
    "attention": attentive,
    "layer norm": lambda: operator(layer_norm()),
    "weight norm": lambda: operator(weight_normed()),
    "checkpoint": lambda: operator(Reentrant()),
    "scripted": lambda: operator(scripted()),
    "float32 inside": lambda: operator(around(lambda h: h.float().softmax(1).double())),
    "batch norm and dropout": lambda: operator(
        around(nn.Sequential(nn.BatchNorm1d(6, dtype=torch.float64), nn.Dropout(0.5)))
    ),
    "forward": lambda: operator(mlp(), strategy=ForwardOverReverse()),
    "differences": lambda: operator(mlp(), strategy=FiniteDifference()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_operator_is_called_healthy(name: str) -> None:
    result = HEALTHY[name]().check(batches=None)
    assert result.healthy, str(result)
    assert result.verdict.startswith("healthy")


def test_a_plain_model_gets_no_note() -> None:
    result = operator(mlp()).check()
    assert result.verdict == "healthy"
    assert str(result).splitlines()[-1] == "verdict: healthy"
    assert [t.strategy for t in result.timings] == [
        "ReverseOverReverse()",
        "ForwardOverReverse()",
        "FiniteDifference()",
    ]
    assert all(t.seconds > 0 and t.error < 1e-6 for t in result.timings)


def failing(*args: Any) -> Any:
    raise KeyError("what the user's own code raises")


def data_that_fails() -> Iterator[Any]:
    yield labelled()
    failing()


def bad_value(value: float) -> list[tuple[Tensor, Tensor]]:
    (x, y), (z, t) = labelled(), labelled()
    z[0, 0] = value
    return [(x, y), (z, t)]


def frozen_later() -> HessianOperator:
    H = operator(mlp())
    H.risk.model.requires_grad_(False)
    return H


def at_a_norm_of_zero() -> HessianOperator:
    model = mlp()
    nn.init.zeros_(model[0].weight)
    penalized = lambda z, t: F.cross_entropy(z, t) + model[0].weight.norm()  # noqa: E731
    return HessianOperator(model, penalized, [labelled()])


BROKEN: dict[str, tuple[Callable[[], HessianOperator], str]] = {
    "model raises": (lambda: operator(around(failing)), "what the user's own code raises"),
    "loss raises": (
        lambda: HessianOperator(mlp(), failing, [labelled()]),
        "what the user's own code raises",
    ),
    "data raise": (
        lambda: HessianOperator(mlp(), LOSS, data_that_fails()),
        "what the user's own code raises",
    ),
    "weight raises": (
        lambda: operator(mlp(), average=Average(weight=failing)),
        "what the user's own code raises",
    ),
    "no batch": (lambda: HessianOperator(mlp(), LOSS, []), "yielded no batch"),
    "wrong shapes": (lambda: HessianOperator(mlp(5), LOSS, [labelled()]), "shapes"),
    "loss is no scalar": (
        lambda: HessianOperator(mlp(), lambda z, t: z, [labelled()]),
        "reduce it, e.g. with .mean()",
    ),
    "loss is a number": (
        lambda: HessianOperator(mlp(), lambda z, t: 1.0, [labelled()]),
        "the loss must be a tensor, got float",
    ),
    "nan": (lambda: HessianOperator(mlp(), LOSS, bad_value(torch.nan)), "loss: nan in batch 1"),
    "inf": (lambda: HessianOperator(mlp(), LOSS, bad_value(torch.inf)), "in batch 1"),
    "norm of zero": (at_a_norm_of_zero, "the second derivative is not finite at 0.weight"),
    "frozen later": (frozen_later, "none has requires_grad=True"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_reported_and_not_raised(name: str) -> None:
    make, words = BROKEN[name]
    result = make().check(batches=None)
    assert not result.healthy
    assert words in str(result)


@pytest.mark.parametrize(
    "caller",
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_a_healthy_operator_is_healthy_wherever_it_is_examined(
    caller: Callable[[], AbstractContextManager[Any]],
) -> None:
    with caller():
        assert operator(mlp()).check().verdict == "healthy"


def test_the_check_changes_nothing_of_the_users() -> None:
    model = around(nn.Sequential(nn.BatchNorm1d(6, dtype=torch.float64), nn.Dropout(0.5)))
    model.append(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64)))
    x, y = labelled()
    problem = Problem(model, [(x.requires_grad_(), y)], nn.CrossEntropyLoss())
    leave_gradients(problem)
    before = seen_of_the_user(problem)
    H = HessianOperator(problem.model, problem.loss, problem.data)
    Hv = H @ vector(model)
    assert H.check(batches=None).healthy
    after = seen_of_the_user(problem)
    assert [key for key, seen in before.items() if not same(seen, after[key])] == []
    assert torch.equal(H @ vector(model), Hv)


def test_the_check_leaves_penalized_parameters_and_their_gradients_alone() -> None:
    model = mlp()
    held = list(model.parameters())  # a penalty that reaches them past the model

    def penalized(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + sum(p.square().sum() * p.sum() for p in held)

    assert HessianOperator(model, penalized, [labelled()]).check().verdict == "healthy"
    assert all(p.grad is None for p in model.parameters())


def test_a_generator_that_was_examined_still_gives_its_batches() -> None:
    model, (x, y) = mlp(), labelled()
    batches = list(zip(x.split(10), y.split(10), strict=True))
    H = HessianOperator(model, LOSS, iter(batches))
    assert H.check().healthy
    twin = copy.deepcopy(model)
    assert torch.equal(H @ vector(model), HessianOperator(twin, LOSS, batches) @ vector(model))
