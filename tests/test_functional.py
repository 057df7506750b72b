"""The plain functions do what their documentation says, sentence by sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hvpop import BATCHES, HessianOperator
from hvpop.functional import (
    batch_hvp_gen,
    batch_loss_function,
    empirical_loss_function,
    get_hvp_function,
    hvp,
)
from tests.curvature.problems import error, mlp, random
from tests.functions import Cube

both_ways = pytest.mark.parametrize("reverse_only", [True, False])
SIZES = (10, 10, 3)


X, Y = random(23, 4), random(23, 3, seed=1)
DATA = list(zip(X.split(SIZES), Y.split(SIZES), strict=True))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def dense(model: nn.Module, data: Any, **settings: Any) -> Tensor:
    return HessianOperator(model, nn.MSELoss(), data, **settings).to_dense()


# -- hvp -----------------------------------------------------------------------------------------------


@both_ways
def test_the_hessian_of_a_sum_of_squares_is_twice_the_identity(reverse_only: bool) -> None:
    ones = torch.ones(10)
    product = hvp(lambda z: (z**2).sum(), ones, ones, reverse_only=reverse_only)
    assert torch.equal(product, torch.full((10,), 2.0))


def test_reverse_mode_is_the_default() -> None:
    z, v = random(5), random(5, seed=1)
    product = hvp(lambda z: Cube.apply(z).sum(), z, v)
    assert error(product, 6 * z * v) < 1e-14
    with pytest.raises(RuntimeError, match="has no jvp"):
        hvp(lambda z: Cube.apply(z).sum(), z, v, reverse_only=False)


@both_ways
@pytest.mark.parametrize("kind", [dict, tuple])
def test_the_product_is_of_the_kind_of_the_parameters(kind: type, reverse_only: bool) -> None:
    a, b, u, v = random(3), random(2, 2, seed=1), random(3, seed=2), random(2, 2, seed=3)

    def func(params: Any) -> Tensor:
        x, y = params if kind is tuple else (params["x"], params["y"])
        return (x**3).sum() + x.sum() * (y**2).sum()

    make = (lambda x, y: (x, y)) if kind is tuple else (lambda x, y: kind(x=x, y=y))
    product = hvp(func, make(a, b), make(u, v), reverse_only=reverse_only)
    assert type(product) is kind
    px, py = product if kind is tuple else (product["x"], product["y"])
    assert error(px, 6 * a * u + 2 * (b * v).sum()) < 1e-14
    assert error(py, 2 * b * u.sum() + 2 * a.sum() * v) < 1e-14


@both_ways
def test_matrices_and_scalars_are_parameters_too(reverse_only: bool) -> None:
    W, V = random(3, 4), random(3, 4, seed=1)
    assert error(hvp(lambda W: (W**4).sum(), W, V, reverse_only), 12 * W**2 * V) < 1e-14
    s = torch.tensor(2.0, dtype=torch.float64)
    assert hvp(lambda s: s**3, s, torch.ones_like(s), reverse_only).item() == pytest.approx(12.0)


@both_ways
def test_hvp_leaves_its_arguments_alone(reverse_only: bool) -> None:
    z, v = random(4).requires_grad_(), random(4, seed=1)
    z0, v0 = z.detach().clone(), v.clone()
    hvp(lambda z: (z**3).sum(), z, v, reverse_only=reverse_only)
    assert z.grad is None
    assert torch.equal(z.detach(), z0)
    assert torch.equal(v, v0)


@pytest.mark.parametrize(
    ("params", "vec"),
    [
        (torch.ones(3), torch.ones(4)),
        (torch.ones(3), torch.ones(3, 1)),
        ({"a": torch.ones(3)}, {"b": torch.ones(3)}),
        ((torch.ones(3),), (torch.ones(3), torch.ones(1))),
        ((torch.ones(3),), torch.ones(3)),
    ],
)
def test_a_vector_unlike_the_parameters_is_refused(params: Any, vec: Any) -> None:
    with pytest.raises(ValueError, match="hvp: vec must be like params, expected shapes"):
        hvp(lambda p: torch.ones(()), params, vec)


def test_parameters_of_another_kind_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"hvp: params must be a tensor, or a dict or tuple .*, got int"
    ):
        hvp(lambda p: p, 3, 3)  # type: ignore[type-var]


# -- losses as functions -----------------------------------------------------------------------------------


def test_the_batch_loss_is_the_loss_on_one_batch() -> None:
    model = mlp()
    f = batch_loss_function(model, nn.MSELoss(), X, Y)
    params = {name: 1.5 * p for name, p in values(model).items()}
    by_hand = torch.func.functional_call(model, params, X)
    assert error(f(params), F.mse_loss(by_hand, Y)) < 1e-14


def test_the_empirical_loss_is_the_sample_weighted_mean_of_batch_losses() -> None:
    model = mlp()
    f = empirical_loss_function(model, nn.MSELoss(), DATA)
    params = {name: 1.5 * p for name, p in values(model).items()}
    by_hand = sum(
        len(x) * F.mse_loss(torch.func.functional_call(model, params, x), y) for x, y in DATA
    )
    assert error(f(params), by_hand / 23) < 1e-14
    assert error(f(params), batch_loss_function(model, nn.MSELoss(), X, Y)(params)) < 1e-14


@pytest.mark.parametrize("make", [empirical_loss_function, None])
def test_losses_can_be_differentiated_and_change_nothing(make: Any) -> None:
    model = mlp()
    if make is None:
        f = batch_loss_function(model, nn.MSELoss(), X, Y)
    else:
        f = make(model, nn.MSELoss(), DATA)
    before = values(model)
    params = {name: p.clone().requires_grad_() for name, p in before.items()}
    gradient = torch.autograd.grad(f(params), list(params.values()))
    F.mse_loss(model(X), Y).backward()
    for g, p in zip(gradient, model.parameters(), strict=True):
        assert error(g, p.grad) < 1e-12
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    transformed = torch.func.grad(f)(before)
    assert all(error(transformed[name], p.grad) < 1e-12 for name, p in model.named_parameters())


def test_parameters_that_are_not_named_keep_their_values() -> None:
    model = mlp()
    f = empirical_loss_function(model, nn.MSELoss(), DATA)
    everything = values(model)
    changed = {"0.bias": everything["0.bias"] + 1}
    assert error(f(changed), f(everything | changed)) < 1e-14
    with pytest.raises(
        ValueError, match=r"no .*parameter is called 5\.bias; there are 0\.weight, 0"
    ):
        f({"5.bias": torch.ones(3)})


def test_a_loader_is_read_at_each_call() -> None:
    model = mlp()
    loader = DataLoader(TensorDataset(X, Y), 10, shuffle=True)
    f = empirical_loss_function(model, nn.MSELoss(), loader)
    first = f(values(model))
    assert error(f(values(model)), first) < 1e-14


# -- flat products -------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("average", [True, False])
def test_the_average_weighs_batches_alike_or_takes_the_empirical_loss(
    average: bool, reverse_only: bool
) -> None:
    model = mlp()
    product = get_hvp_function(
        model, nn.MSELoss(), DATA, use_hessian_avg=average, reverse_only=reverse_only
    )
    v = random(43, seed=5)
    each = [dense(model, [batch]) for batch in DATA]
    weights = (1, 1, 1) if average else SIZES
    H = sum(w * h for w, h in zip(weights, each, strict=True)) / sum(weights)
    assert error(product(v), H @ v) < 1e-12
    assert not product(v).requires_grad
    assert error(dense(model, DATA, average=BATCHES) @ v, sum(each) @ v / 3) < 1e-12


@both_ways
def test_each_function_of_the_generator_keeps_its_batch(reverse_only: bool) -> None:
    model, v = mlp(), random(43, seed=5)
    functions = list(batch_hvp_gen(model, nn.MSELoss(), DATA, reverse_only))
    assert len(functions) == 3
    for function, batch in zip(functions, DATA, strict=True):
        assert error(function(v), dense(model, [batch]) @ v) < 1e-12
    assert error(functions[0](v), functions[2](v)) > 1e-3


def test_the_generator_reads_no_batch_ahead() -> None:
    read = []

    def batches() -> Any:
        for i, batch in enumerate(DATA):
            read.append(i)
            yield batch

    functions = batch_hvp_gen(mlp(), nn.MSELoss(), batches())
    assert read == []
    next(functions)
    assert read == [0]


@both_ways
@pytest.mark.parametrize("average", [True, False])
def test_tracked_products_can_be_differentiated(average: bool, reverse_only: bool) -> None:
    """For ``f = mean_i (x_i w)^4`` the third derivative is ``24 mean (xw)(xv)(xu) x``."""
    model = nn.Linear(4, 1, bias=False).double()
    data = [(X[:12], Y[:12, :1]), (X[12:], Y[12:, :1])]
    weights = torch.full((23,), 1 / 23, dtype=torch.float64)
    if average:
        weights = torch.cat([torch.full((n,), 0.5 / n, dtype=torch.float64) for n in (12, 11)])
    product = get_hvp_function(
        model,
        lambda out, _: (out**4).mean(),
        data,
        use_hessian_avg=average,
        reverse_only=reverse_only,
        track_gradients=True,
    )
    v, u = random(4, seed=5), random(4, seed=6)
    Hv, w = product(v), model.weight.detach()[0]
    assert error(Hv.detach(), 12 * X.T @ (weights * (X @ w) ** 2 * (X @ v))) < 1e-12
    (third,) = torch.autograd.grad(u @ Hv, model.weight)
    assert error(third[0], 24 * X.T @ (weights * (X @ w) * (X @ v) * (X @ u))) < 1e-12


def test_products_follow_the_parameters() -> None:
    model, v = mlp(), random(43, seed=5)
    product = get_hvp_function(model, nn.MSELoss(), DATA)
    tracked = get_hvp_function(model, nn.MSELoss(), DATA, track_gradients=True)
    first = product(v)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert error(product(v), dense(model, DATA, average=BATCHES) @ v) < 1e-12
    assert error(tracked(v).detach(), product(v)) < 1e-12
    assert error(product(v), first) > 1e-3


@pytest.mark.parametrize("track", [True, False])
def test_only_trainable_parameters_count(track: bool) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    product = get_hvp_function(model, nn.MSELoss(), DATA, track_gradients=track)
    v = random(23, seed=5)
    assert error(product(v).detach(), dense(model, DATA, average=BATCHES) @ v) < 1e-12
    with pytest.raises(ValueError, match=r"expects shape \(23,\), got \(43,\)"):
        product(random(43))


@pytest.mark.parametrize("track", [True, False])
def test_products_leave_gradients_and_buffers_alone(track: bool) -> None:
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3)).double()
    product = get_hvp_function(model, nn.MSELoss(), DATA, track_gradients=track)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    product(random(49))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
