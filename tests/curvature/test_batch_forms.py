"""The forms of the batches of a Hessian: exact for each, read in one pass, at the memory of one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import (
    BATCHES,
    TOTAL,
    BatchForms,
    Damped,
    HessianOperator,
    HVPStrategy,
    Identity,
    LinearOperator,
    ReverseOverReverse,
)
from hvpop.strategies import LinearMap, Params, ScalarFunction

from .problems import classes, error, mlp, random, regression, set_parameters, split

TIGHT = 1e-12
SIZES = (10, 8, 8, 3)
DATA = split(regression(29), SIZES)
V = random(mlp().state_dict()["0.weight"].numel() + 5 + 15 + 3, 3, seed=9)


def forms_of(A: LinearOperator, columns: Any = V, **settings: Any) -> BatchForms:
    forms = A.batch_forms(columns, **settings)
    assert forms is not None
    return forms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_regression_has_those_of_two_x_transpose_x_over_n(dtype: torch.dtype) -> None:
    X, y = random(29, 5), random(29, 1, seed=1)
    model = set_parameters(nn.Linear(5, 1, bias=False)).to(dtype)
    batches = split((X.to(dtype), y.to(dtype)), SIZES)
    W = random(5, 4, seed=2).to(dtype)
    expected = torch.stack([2 * (x.double() @ W.double()).square().mean(0) for x, _ in batches])
    H = HessianOperator(model, nn.MSELoss(), batches)
    for A in (H, H.linearize(), H.linearize(memory=0)):
        forms = forms_of(A, W)
        assert error(forms.values, expected) < (TIGHT if dtype is torch.float64 else 1e-6)
        assert forms.values.dtype is torch.float64
        assert forms.weights.tolist() == list(SIZES)
        assert error(forms.average(), (W * (H @ W)).sum(0)) < 1e-6


@pytest.mark.parametrize("mode", ["batch", "full"])
@pytest.mark.parametrize("average", [None, BATCHES, TOTAL])
def test_each_batch_has_its_own_hessian_whatever_the_average_and_the_mode(
    average: Any, mode: Any
) -> None:
    settings = {"mode": mode} | ({} if average is None else {"average": average})
    H = HessianOperator(mlp(), nn.MSELoss(), DATA, **settings)
    alone = [HessianOperator(mlp(), nn.MSELoss(), [batch]) for batch in DATA]
    expected = torch.stack([(V * (A @ V)).sum(0) for A in alone])
    for A in (H, H.linearize()):
        forms = forms_of(A)
        assert error(forms.values, expected) < TIGHT
        assert error(forms.average(), (V * (H @ V)).sum(0)) < TIGHT
    assert H.risk.mode == mode


def test_a_live_operator_follows_the_model_and_a_linearized_one_stays() -> None:
    model = mlp()
    H = HessianOperator(model, nn.MSELoss(), DATA)
    A = H.linearize()
    before = forms_of(H).values
    model[0].weight.data.mul_(1.5)
    assert error(forms_of(A).values, before) < TIGHT
    assert error(forms_of(H).values, before) > 1e-3
    assert error(forms_of(H).values, forms_of(H.linearize()).values) < TIGHT


def test_scaling_and_damping_scale_and_shift_the_forms() -> None:
    H = HessianOperator(mlp(), nn.MSELoss(), DATA)
    expected = 2 * forms_of(H).values + 2 * 0.3 * V.square().sum(0)
    for A in (2 * Damped(H, 0.3), 2 * H + 0.6 * Identity.like(H)):
        assert error(forms_of(A).values, expected) < TIGHT
        assert error(forms_of(A.linearize()).values, expected) < TIGHT
    by_name = Damped(H, {"0.*": 0.3})
    assert error(forms_of(by_name).standard_error(), forms_of(H).standard_error()) < 1e-10


class Counted:
    """Batches that are no list, so that they are read at every pass, and are counted."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in DATA:
            self.read += 1
            yield batch


def test_the_data_are_read_once_and_the_first_batches_only_as_far_as_asked() -> None:
    for linearize in (False, True):
        data = Counted()
        H: Any = HessianOperator(mlp(), nn.MSELoss(), data)
        A = H.linearize() if linearize else H
        whole = forms_of(A)
        assert data.read == len(DATA)
        first = forms_of(A, batches=2)
        assert data.read == len(DATA) + 2
        assert torch.equal(first.values, whole.values[:2])
        assert error(A @ V, H @ V) < TIGHT  # a pass that was broken off does not disturb the next


def test_batches_without_weight_do_not_count() -> None:
    X, y = random(12, 4), classes(12)
    y[4:8] = -100
    H = HessianOperator(mlp(), nn.CrossEntropyLoss(), split((X, y), (4, 4, 4)))
    assert forms_of(H).weights.tolist() == [4.0, 4.0]


class OneAtATime(HVPStrategy):
    """Sees to it that the map of a batch is gone before the next is made."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[LinearMap]] = []

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        assert not [ref for ref in self.alive if ref() is not None]
        made = ReverseOverReverse().linearize(fn, params, *args)
        self.alive.append(weakref.ref(made))
        return made


@pytest.mark.parametrize("mode", ["batch", "full"])
def test_the_memory_is_that_of_one_batch(mode: Any) -> None:
    strategy = OneAtATime()
    H = HessianOperator(mlp(), nn.MSELoss(), DATA, strategy=strategy, mode=mode)
    forms_of(H)
    forms_of(H.linearize())
    assert len(strategy.alive) == 2 * len(DATA)


def segments(out: Tensor, y: Tensor) -> Tensor:
    """A loss with an op that has no double backward."""
    lengths = torch.tensor([2, len(out) - 2])
    pooled = torch.segment_reduce(out.tanh(), "sum", lengths=lengths)
    return pooled.square().mean() + (out - y).square().mean()


def by_hand(out: Tensor, y: Tensor) -> Tensor:
    pooled = torch.stack([out.tanh()[:2].sum(0), out.tanh()[2:].sum(0)])
    return pooled.square().mean() + (out - y).square().mean()


@pytest.mark.filterwarnings("ignore:batches are weighted by")
@pytest.mark.parametrize("linearize", [False, True])
def test_where_the_first_strategy_fails_the_pass_begins_anew_with_the_next(linearize: bool) -> None:
    H: Any = HessianOperator(mlp(), segments, DATA)
    with pytest.warns(UserWarning, match="no double backward"):
        forms = forms_of(H.linearize() if linearize else H)
    assert error(forms.values, forms_of(HessianOperator(mlp(), by_hand, DATA)).values) < 1e-6


def test_forms_that_are_not_finite_are_refused_with_their_batch() -> None:
    data = [*DATA[:2], (DATA[2][0] * float("inf"), DATA[2][1])]
    H = HessianOperator(mlp(), nn.MSELoss(), data)
    for A in (H, H.linearize()):
        with pytest.raises(
            FloatingPointError,
            match=r"Hessian.*: the forms of its.*not finite; in batch 2 the loss is nan",
        ):
            A.batch_forms(V)


def test_no_mode_of_torch_changes_the_forms_and_they_carry_no_graph() -> None:
    H = HessianOperator(mlp(), nn.MSELoss(), DATA)
    expected = forms_of(H).values
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert torch.equal(forms_of(H).values, expected)
    assert not forms_of(H, V.clone().requires_grad_()).values.requires_grad
