"""A product that is not finite names the batch, and what went wrong there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import HessianOperator, ReverseOverReverse

from .problems import error, mlp, random, regression, split

DATA = split(regression(), (10, 10, 3))


def broken(batch: int, value: float) -> list[tuple[Tensor, Tensor]]:
    data = [(x.clone(), y.clone()) for x, y in DATA]
    data[batch][0][0, 0] = value
    return data


def at_a_kink(out: Tensor, y: Tensor) -> Tensor:
    """Has a gradient at zero outputs, by torch's convention, but no second derivative."""
    return (0 * out + (out - out.detach())).norm()


NOT_FINITE: dict[str, tuple[Any, Any, str]] = {
    "batch": (nn.MSELoss(), broken(1, torch.nan), "in batch 1 the loss is nan"),
    "infinite batch": (
        lambda out, y: (out - y).square().mean().exp() * 1e308,
        DATA,
        "in batch 0 the loss is inf",
    ),
    "gradient": (
        lambda out, y: (0 * out).sum().sqrt(),
        DATA,
        "in batch 0 the gradient of 0.weight is not finite",
    ),
    "second derivative": (
        at_a_kink,
        DATA,
        "in batch 0 the second derivative is not finite at .*, although loss and gradient are: "
        r"it may not exist at this point \(a norm or a square root at zero\)",
    ),
}


@pytest.mark.parametrize("strategy", [None, ReverseOverReverse()], ids=repr)
@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.filterwarnings("ignore:.*batches are run one by one")
def test_a_product_that_is_not_finite_names_the_culprit(
    name: str, linearized: bool, strategy: Any
) -> None:
    loss, data, message = NOT_FINITE[name]
    H: Any = HessianOperator(mlp(), loss, data, strategy=strategy)
    H = H.linearize() if linearized else H
    with pytest.raises(FloatingPointError, match=f"the product is not finite; {message}"):
        H @ random(H.shape[1])
    with pytest.raises(FloatingPointError, match=message):
        H @ random(H.shape[1], 2)


def zeroed() -> nn.Module:
    """A model whose outputs are zero."""
    model = mlp()
    for p in model[2].parameters():
        p.data.zero_()
    return model


def fourth_powers(out: Tensor, y: Tensor) -> Tensor:
    return (torch.linalg.vector_norm(out, 4, dim=1, keepdim=True) ** 4 + out - y).square().mean()


def fourth_powers_by_hand(out: Tensor, y: Tensor) -> Tensor:
    return (out.pow(4).sum(1, keepdim=True) + out - y).square().mean()


def masked(out: Tensor, y: Tensor) -> Tensor:
    hidden = (torch.arange(3) == 0)[:, None].expand(3, 3)
    scores = (out.T @ out).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ out.T).square().mean()


def masked_by_hand(out: Tensor, y: Tensor) -> Tensor:
    return ((out.T @ out)[1:].softmax(-1) @ out.T).square().sum() / y.numel()


EXISTS: dict[str, tuple[Any, Any, Any]] = {
    "a norm that is smooth at zero": (zeroed, fourth_powers, fourth_powers_by_hand),
    "a row that is masked altogether": (mlp, masked, masked_by_hand),
}


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize("name", EXISTS)
def test_a_second_derivative_that_only_torch_has_not_comes_from_differences(
    name: str, linearized: bool
) -> None:
    model, loss, by_hand = EXISTS[name]
    H: Any = HessianOperator(model(), loss, DATA[:1])
    H = H.linearize() if linearized else H
    V = random(H.shape[1], 2)
    with pytest.warns(UserWarning, match="is not finite.*using FiniteDifference"):
        product = H @ V
    expected = HessianOperator(model(), by_hand, DATA[:1]) @ V
    # Central differences: the square of a step of the cube root of eps, times higher derivatives.
    assert error(product, expected) < 1e-8
    assert torch.equal(H @ V, product)
    G = HessianOperator(model(), loss, DATA[:1], strategy=ReverseOverReverse())
    with pytest.raises(FloatingPointError, match="the second derivative is not finite"):
        G @ V


def even(out: Tensor, y: Tensor) -> Tensor:
    """Of a gradient with a kink that is the same on both sides, as central differences are."""
    return out.norm() * out.sum() + out.square().mean()


def homogeneous(out: Tensor, y: Tensor) -> Tensor:
    """Twice differentiable along each line through the point, and not at it."""
    a, b = out.sum(0)[:2]
    return a**2 * b**2 / torch.stack([a, b]).norm() ** 2 + out.square().mean()


@pytest.mark.parametrize("loss", [even, homogeneous])
def test_differences_do_not_serve_where_there_is_no_second_derivative(loss: Any) -> None:
    H = HessianOperator(zeroed(), loss, DATA[:1])
    with pytest.raises(FloatingPointError, match="not finite"):
        H @ random(H.shape[1])


@pytest.mark.filterwarnings("ignore:.*batches are run one by one")
@pytest.mark.parametrize("linearized", [False, True])
def test_vectors_and_parameters_that_are_not_finite_are_named(linearized: bool) -> None:
    model = mlp()
    H: Any = HessianOperator(model, nn.MSELoss(), DATA)
    A = H.linearize() if linearized else H
    v = random(H.shape[1])
    v[3] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite; the vector it multiplies is not"):
        A @ v
    model[2].bias.data[0] = torch.nan
    A = H.linearize() if linearized else H
    with pytest.raises(FloatingPointError, match=r"not finite; parameter 2\.bias is not"):
        A @ random(H.shape[1])
