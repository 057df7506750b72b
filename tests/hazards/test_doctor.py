"""The doctor finds what is silently wrong, and what was done about what would have been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hvpop import ForwardOverReverse, HessianOperator
from hvpop.curvature.findings import CheckResult
from hvpop.risk.policies import TwiceDifferentiable
from hvpop.risk.rewrites import REWRITES
from hvpop.strategies import forward

from .problems import labelled, mlp
from .sick import SICK, Reentrant, around, operator, weight_normed, without_grad


def said(result: CheckResult, level: str) -> str:
    """Return what was found at one level."""
    found = [f for f in result.findings if f.level == level]
    return "\n".join(f"{f.what}: {f.detail}" for f in found)


@pytest.mark.parametrize("name", SICK)
def test_a_silent_error_is_found(name: str) -> None:
    make, words = SICK[name]
    result = make().check()
    assert not result.healthy
    assert result.verdict.startswith("do not trust this operator yet: ")
    assert words in said(result, "wrong")


def test_the_wrong_double_backward_of_weight_norm_is_found(monkeypatch: Any) -> None:
    assert "weight_norm on 1: rewritten" in said(operator(weight_normed()).check(), "note")
    monkeypatch.delitem(REWRITES, torch._weight_norm)
    found = said(operator(weight_normed()).check(), "wrong")
    assert "symmetry" in found
    assert "finite differences" in found


def test_a_reentrant_checkpoint_left_in_place_is_found(monkeypatch: Any) -> None:
    monkeypatch.setattr(TwiceDifferentiable, "_run_checkpoints_plainly", lambda self: None)
    result = operator(Reentrant()).check()
    assert "ReverseOverReverse(): cannot be used" in said(result, "note")
    assert result.healthy  # by differences, which see what a backward pass inside adds


def test_forward_mode_that_sees_through_no_grad_is_told_apart(monkeypatch: Any) -> None:
    monkeypatch.delitem(forward._FORWARD, torch._C._set_grad_enabled)
    result = operator(around(without_grad)).check()
    assert not result.healthy
    assert "ReverseOverReverse(): is off by" in said(result, "note")  # where forward mode is not


def scattered(x: torch.Tensor) -> torch.Tensor:
    index = torch.tensor([0, 1, 0, 1, 2, 2]).expand_as(x)
    return x.new_ones(len(x), 6).scatter_reduce(1, index, x, "prod")


def test_a_wrong_forward_rule_is_noted_beside_a_right_operator(monkeypatch: Any) -> None:
    for op in (torch.scatter_reduce, torch.Tensor.scatter_reduce):
        monkeypatch.delitem(REWRITES, op)
    result = operator(around(scattered)).check()
    assert result.healthy
    assert "ForwardOverReverse(): is off by" in said(result, "note")
    wrong = operator(around(scattered), strategy=ForwardOverReverse()).check()
    assert "agree with ReverseOverReverse(): use that" in said(wrong, "wrong")


@pytest.mark.parametrize(
    ("op", "layer"),
    [
        (F.hardsigmoid, nn.Hardsigmoid()),
        (F.multi_margin_loss, lambda x: x + F.multi_margin_loss(x, x.argmax(1))),
    ],
)
def test_an_op_without_second_derivative_is_named(
    op: Callable[..., Any], layer: Any, monkeypatch: Any
) -> None:
    assert operator(around(layer)).check().verdict == "healthy"
    monkeypatch.delitem(REWRITES, op)
    H = operator(around(layer))
    result = H.check()
    assert result.healthy
    assert "; using FiniteDifference() for this operator" in said(result, "note")
    assert repr(H.strategy) == "ReverseOverReverse()"  # steps down are the operator's own to take


def test_kinks_are_no_fault_of_the_operator_and_leave_it_open() -> None:
    model, data = mlp(), [labelled()]
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0  # where abs has a kink

    def penalized(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z, t) + 0.1 * model[0].weight.abs().sum()

    result = HessianOperator(model, penalized, data).check()
    assert result.verdict == "undecided, nothing wrong was found: finite differences of gradients"
    assert not result.healthy
    assert "there are kinks near the point" in said(result, "open")


def test_a_parameter_that_nothing_uses_is_named() -> None:
    model = nn.Sequential(mlp())
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    result = operator(model).check()
    assert result.verdict == "healthy, one note"
    assert "parameters without gradient: spare: zero rows and columns" in said(result, "note")


def test_train_mode_and_dropped_samples_are_noted() -> None:
    model = around(nn.Sequential(nn.BatchNorm1d(6, dtype=torch.float64), nn.Dropout(0.5)))
    pairs = torch.utils.data.TensorDataset(*labelled())
    loader = torch.utils.data.DataLoader(pairs, 10, drop_last=True)
    result = HessianOperator(model, nn.CrossEntropyLoss(), loader).check()
    notes = said(result, "note")
    assert "train mode in 1.0: batch statistics" in notes
    assert "train mode in 1.1: one mask per batch" in notes
    assert "3 of 23 samples will be missing" in notes
    assert result.healthy


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-25])
def test_a_product_whose_square_float32_does_not_hold_is_no_random_one(scale: float) -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    H = HessianOperator(nn.Linear(3, 2), lambda z, y: scale * ((z - y) ** 2).mean(), [(x, y)])
    assert said(H.check(), "wrong") == ""
