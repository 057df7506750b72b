"""Hessians that are known on paper, and dense double backward where they are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import (
    FiniteDifference,
    ForwardOverReverse,
    HessianOperator,
    HVPStrategy,
    ReverseOverReverse,
)
from hvpop.functional import get_hvp_function

from .problems import classes, dense_hessian, error, mlp, random, set_parameters, split

F64, F32 = torch.float64, torch.float32
EXACT = {F64: 1e-10, F32: 1e-5}
# Central differences err by eps^(2/3), times the fourth derivative over the second (LayerNorm: 10^4).
DIFFERENCE = {F64: 1e-5, F32: 5e-2}
STRATEGIES = [ReverseOverReverse, ForwardOverReverse, FiniteDifference]

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
both_precisions = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])


def tolerance(strategy: type[HVPStrategy], dtype: torch.dtype) -> float:
    return (DIFFERENCE if strategy is FiniteDifference else EXACT)[dtype]


class Quadratic(nn.Module):
    """``w' A w / 2`` for each row of a batch that is not looked at."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.w = nn.Parameter(torch.ones(len(A), dtype=A.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.w @ self.A @ self.w + 0 * x.sum()


@both_precisions
@every_strategy
def test_the_hessian_of_a_quadratic_is_its_matrix(
    strategy: type[HVPStrategy], dtype: torch.dtype
) -> None:
    A = random(6, 6, dtype=dtype)
    A = A + A.T
    data = [(torch.zeros(2, 1, dtype=dtype), torch.zeros(2, dtype=dtype))]
    H = HessianOperator(Quadratic(A), lambda value, _: value, data, strategy=strategy())
    assert error(H.to_dense(), A) < tolerance(strategy, dtype)


@both_precisions
@every_strategy
def test_linear_regression_has_two_x_transpose_x_over_n(
    strategy: type[HVPStrategy], dtype: torch.dtype
) -> None:
    X, y = random(23, 5, dtype=dtype), random(23, 1, seed=1, dtype=dtype)
    model = set_parameters(nn.Linear(5, 1, bias=False).to(dtype))
    data = split((X, y), (10, 10, 3))
    H = HessianOperator(model, nn.MSELoss(), data, strategy=strategy())
    expected = 2 * X.double().T @ X.double() / 23
    assert error(H.to_dense(), expected) < tolerance(strategy, dtype)
    assert error(H.linearize().to_dense(), expected) < tolerance(strategy, dtype)


@both_precisions
@every_strategy
def test_softmax_regression_has_the_kronecker_product_of_its_covariances(
    strategy: type[HVPStrategy], dtype: torch.dtype
) -> None:
    """``mean_i (diag(p_i) - p_i p_i') (x) x_i x_i'`` for weights (classes, inputs)."""
    X, y = random(23, 4, dtype=dtype), classes(23)
    model = set_parameters(nn.Linear(4, 3, bias=False).to(dtype))
    H = HessianOperator(
        model, nn.CrossEntropyLoss(), split((X, y), (10, 10, 3)), strategy=strategy()
    )
    p = torch.softmax(model(X), 1).detach().double()
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    blocks = torch.einsum("nab,ni,nj->aibj", covariance, X.double(), X.double()) / 23
    assert error(H.to_dense(), blocks.reshape(12, 12)) < tolerance(strategy, dtype)


@pytest.mark.parametrize("reverse_only", [True, False])
def test_a_tracked_product_has_the_third_derivative(reverse_only: bool) -> None:
    """``f = mean_i (x_i w)^4``: ``Hv = 12 mean (xw)^2 (xv) x``, ``D(u'Hv) = 24 mean (xw)(xv)(xu) x``."""
    X, v, u = random(23, 4), random(4, seed=1), random(4, seed=2)
    model = set_parameters(nn.Linear(4, 1, bias=False).double())
    product = get_hvp_function(
        model,
        lambda out, _: (out**4).mean(),
        [(X, torch.zeros(23, 1))],
        reverse_only=reverse_only,
        track_gradients=True,
    )
    Hv = product(v)
    w = model.weight.detach()[0]
    assert error(Hv.detach(), 12 * X.T @ ((X @ w) ** 2 * (X @ v)) / 23) < 1e-10
    (third,) = torch.autograd.grad(u @ Hv, model.weight)
    assert error(third[0], 24 * X.T @ ((X @ w) * (X @ v) * (X @ u)) / 23) < 1e-10


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Softplus(),
        nn.Conv2d(2, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))


MODELS = {
    "mlp": lambda: mlp(16, 4, 3),
    "convolutional": convolutional,
    "layer norm": normalized,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "squares": lambda out, y: F.mse_loss(out, F.one_hot(y, 3).to(out)),
}


@both_precisions
@every_strategy
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_networks_have_the_hessian_of_dense_double_backward(
    name: str, loss: str, strategy: type[HVPStrategy], dtype: torch.dtype
) -> None:
    model = set_parameters(MODELS[name]().double())
    X, y = random(9, 16), classes(9)
    expected = dense_hessian(model, lambda: LOSSES[loss](model(X), y))
    model.to(dtype)
    data = split((X.to(dtype), y), (4, 5))
    H = HessianOperator(model, LOSSES[loss], data, strategy=strategy())
    V = random(H.shape[1], 3, dtype=dtype)
    assert error(H @ V, expected @ V.double()) < tolerance(strategy, dtype)
    A = H.linearize()
    assert error(A @ V, expected @ V.double()) < tolerance(strategy, dtype)
    assert error(A @ V[:, 0], expected @ V[:, 0].double()) < tolerance(strategy, dtype)
