"""Callers and numbers: grad modes, autocast, half precision, steps, values that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from hvpop import FiniteDifference, ForwardOverReverse, HessianOperator

from .problems import (
    EXACT,
    Apply,
    error,
    labelled,
    mlp,
    random,
    set_parameters,
    truth,
    vector,
)

LOSS = nn.CrossEntropyLoss()
SINGLE = 2e-6  # float32 epsilons, some ten of them


def single() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Return a float32 model, its data, a vector, and the product found in float64."""
    model, (x, y) = mlp(dtype=torch.float32), labelled()
    x, v = x.float(), vector(model).float()
    exact = mlp()
    exact.load_state_dict(model.state_dict())
    return model, [(x, y)], v, truth(exact, x.double(), y) @ v.double()


@pytest.mark.parametrize("strategy", [None, ForwardOverReverse()], ids=repr)
@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_products_work_where_gradients_are_off(
    caller: Callable[[], AbstractContextManager[Any]], strategy: Any
) -> None:
    solve = Apply(lambda x: torch.linalg.solve(torch.eye(5).double() + x.mT @ x, F.silu(x).mT).mT)
    model, (x, y) = nn.Sequential(mlp(4, 5, 5), solve, mlp(5, 4, 3)), labelled()
    v = vector(model)
    with caller():  # where forward mode over solve would be wrong, and over silu raise
        H = HessianOperator(model, LOSS, [(x, y)], strategy=strategy)
        live, kept = H @ v, H.linearize() @ v
    expected = truth(model, x, y) @ v
    assert error(live.clone(), expected) < EXACT
    assert error(kept.clone(), expected) < EXACT


def test_batches_made_under_inference_mode_are_taken() -> None:
    model, (x, y) = mlp(), labelled()
    with torch.inference_mode():
        batch = (x.clone(), y.clone())
    v = vector(model)
    H = HessianOperator(model, LOSS, [batch])
    assert error(H @ v, truth(model, x, y) @ v) < EXACT
    assert batch[0].is_inference()


def test_autocast_around_a_product_does_not_blunt_it() -> None:
    model, data, v, expected = single()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = HessianOperator(model, LOSS, data) @ v
        blunt = truth(model, *data[0]) @ v
    assert error(product, expected) < SINGLE
    assert error(blunt, expected) > 1e-3


def test_half_precision_is_warned_about_and_summed_in_single() -> None:
    layer, (x, y) = set_parameters(nn.Linear(4, 3).bfloat16()), labelled()
    model, batch = nn.Sequential(layer, Apply(torch.clone)), (x.bfloat16(), y)
    with pytest.warns(UserWarning, match="accurate to two or three digits"):
        H = HessianOperator(model, LOSS, [batch] * 600)
    v = vector(model).bfloat16()
    exact = nn.Linear(4, 3, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    expected = truth(exact, batch[0].double(), y) @ v.double()
    assert error(H @ v.float(), expected) < 4 * torch.finfo(torch.bfloat16).eps
    one, stuck = truth(model, *batch) @ v, torch.zeros_like(v)
    for _ in range(600):
        stuck += one  # at 256 times one, where the next number is two further
    assert error(stuck / 600, expected) > 0.3


@pytest.mark.parametrize("exponent", [-90, -30, 20, 90])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_float16_parameters_take_vectors_beyond_their_range(all_of_it: bool, exponent: int) -> None:
    """From 6e-8 to 65504; by a power of two, so that nothing is rounded differently."""
    first, last = mlp(4, 5, 5, torch.float16), mlp(5, 4, 3, torch.float16)
    x, y = labelled()
    if all_of_it:
        with pytest.warns(UserWarning, match="two or three digits"):
            H = HessianOperator(nn.Sequential(first, last), LOSS, [(x.half(), y)])
    else:
        model = nn.Sequential(first, Apply(Tensor.float), last.float())
        H = HessianOperator(model, LOSS, [(x.half(), y)])
        assert H.torch_dtype is torch.float32
    v, scale = vector(H.risk.model).float(), 2.0**exponent
    for A in (H, H.linearize()):
        for w in (v, torch.stack([v, v.flip(0)], 1)):
            assert torch.equal(A @ (scale * w), scale * (A @ w))
    forms, scaled = (H.batch_forms(c * v.unsqueeze(1)).values for c in (1.0, scale))
    assert torch.equal(scaled, scale**2 * forms)


def test_a_vector_that_is_not_finite_is_still_named_in_float16() -> None:
    model, (x, y) = mlp(4, 3, dtype=torch.float16), labelled()
    with pytest.warns(UserWarning, match="two or three digits"):
        H = HessianOperator(model, LOSS, [(x.half(), y)])
    v = vector(model).float()
    v[0] = torch.inf
    with pytest.raises(FloatingPointError, match="the vector it multiplies is not"):
        H @ v


def test_differences_of_half_precision_are_refused() -> None:
    model, (x, y) = mlp().bfloat16(), labelled()
    with pytest.warns(UserWarning, match="two or three digits"):
        H = HessianOperator(model, LOSS, [(x.bfloat16(), y)], strategy=FiniteDifference())
    with pytest.raises(TypeError, match=r"float32 or float64 parameters, got torch.bfloat16"):
        H @ vector(model).float()


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_difference_takes_a_step_of_the_right_length(scale: float) -> None:
    model, (x, y) = mlp(), labelled()
    v = vector(model)
    H = HessianOperator(model, LOSS, [(x, y)], strategy=FiniteDifference())
    assert error((H @ (scale * v)) / scale, truth(model, x, y) @ v) < 1e-8


def test_differences_are_the_last_resort_because_of_kinks() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        model.append(nn.Linear(64, 3))
    x, y, v = random(64, 20, dtype=torch.float32), labelled(64)[1], vector(model).float()
    H = HessianOperator(model, LOSS, [(x, y)])
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(LOSS(model(x), y), parameters, create_graph=True)
    rows = torch.autograd.grad(parameters_to_vector(gradient), parameters, v)
    expected = parameters_to_vector(rows)
    assert error(H @ v, expected) < SINGLE
    assert repr(H.strategy) == "ReverseOverReverse()"
    wrong = HessianOperator(model, LOSS, [(x, y)], strategy=FiniteDifference()) @ v
    assert error(wrong, expected) > 0.5


def test_an_op_without_second_derivative_falls_back_with_one_warning() -> None:
    total = Apply(lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([20, 3])))
    model, x, y = nn.Sequential(mlp(), total), labelled()[0], labelled(2)[1]
    H, v = HessianOperator(model, LOSS, [(x, y)]), vector(model)
    with pytest.warns(UserWarning, match="segment_reduce.*no double backward; using FiniteDiff"):
        first = H @ v
    assert torch.equal(H @ v, first)
    explicit = nn.Sequential(model[0], Apply(lambda x: torch.stack([x[:20].sum(0), x[20:].sum(0)])))
    assert error(first, truth(explicit, x, y) @ v) < 1e-8


def test_a_vector_that_is_not_finite_is_named() -> None:
    model = mlp()
    v = vector(model)
    v[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite; the vector it multiplies is not"):
        HessianOperator(model, LOSS, [labelled()]) @ v


def test_a_parameter_that_is_not_finite_is_named() -> None:
    model = mlp()
    model[2].bias.data[1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"not finite; parameter 2\.bias is not"):
        HessianOperator(model, LOSS, [labelled()]) @ vector(model)


def test_a_batch_that_is_not_finite_is_named() -> None:
    model, (x, y) = mlp(), labelled()
    bad = x.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite; in batch 1 the loss is nan"):
        HessianOperator(model, LOSS, [(x, y), (bad, y)]) @ vector(model)


def test_a_second_derivative_that_does_not_exist_is_named() -> None:
    model, data = mlp(), [labelled()]
    nn.init.zeros_(model[0].weight)
    H = HessianOperator(model, lambda z, t: F.cross_entropy(z, t) + model[0].weight.norm(), data)
    with pytest.raises(FloatingPointError, match=r"in batch 0 the second derivative.*at 0\.weight"):
        H @ vector(model)


def test_a_vector_of_another_dtype_is_refused_with_the_fix() -> None:
    model = mlp()
    H = HessianOperator(model, LOSS, [labelled()])
    with pytest.raises(TypeError, match=r"float64.*float32.*x\.to\(A\.torch_dtype\)"):
        H @ vector(model).float()


def test_a_result_is_memory_of_its_own() -> None:
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def squared_sum(z: Tensor, t: Tensor) -> Tensor:
        return model.weight.sum() ** 2  # whose product is expanded, of stride zero

    v = random(4)
    H = HessianOperator(model, squared_sum, [(random(3, 4), random(3, 1))])
    for A in (H, H.linearize()):
        expected = torch.full((4,), float(2 * v.sum()), dtype=torch.float64)
        product = A @ v
        assert product.is_contiguous()
        product += torch.arange(4.0, dtype=torch.float64)
        assert error(A @ v, expected) < EXACT
        assert error(product, expected + torch.arange(4.0)) < EXACT
