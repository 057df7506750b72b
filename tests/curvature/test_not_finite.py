"""A product that is not finite names the batch, and what went wrong there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import HessianOperator, ReverseOverReverse

from .problems import mlp, random, regression, split

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
