"""Nested batches: right where torch can differentiate twice, by differences where it can once, else told."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import BATCHES, FiniteDifference, HessianOperator, ReverseOverReverse
from hvpop.strategies import NoSecondDerivativeError
from hvpop.strategies.graphs import NoDerivativeError

from .problems import random

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
D = torch.float64


def nested(*lengths: int, layout: torch.layout = torch.jagged) -> Tensor:
    parts = [random(n, 4, seed=n) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=layout)


def padded(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(outputs, 0.0).square().mean()


def entries(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.values().square().mean()


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def seeded(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=i))
    return model


DIFFERENCE = 1e-7  # a central difference in float64: eps**(2/3) and the curvature of the gradient

EXACT = {
    "linear": lambda: seeded(nn.Linear(4, 3)),
    "tanh": lambda: seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    "softmax": lambda: seeded(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 2)),
}
ONCE = {
    "layer norm": lambda: seeded(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
    "rms norm": lambda: seeded(nn.Linear(4, 5), nn.RMSNorm(5)),
}


def operator(model: nn.Module, *, loss: Any = entries, data: Any = None, **options: Any) -> Any:
    data = data or [(nested(2, 5, 3), torch.zeros(3)), (nested(4, 1), torch.zeros(2))]
    return HessianOperator(model, loss, data, average=BATCHES, **options)


def _jagged_twice() -> bool:
    """Whether torch differentiates a linear layer of jagged rows twice: 2.6 does not."""
    layer = seeded(nn.Linear(4, 3))
    loss = entries(layer(nested(2, 5)), torch.zeros(2))
    try:
        gradient = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
        gradient[0].sum().backward()
    except RuntimeError:
        return False
    return True


with warnings.catch_warnings(action="ignore"):
    TWICE = _jagged_twice()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("columns", [(), (3,)])
def test_a_product_is_that_of_the_same_rows_unnested(name: str, columns: tuple[int, ...]) -> None:
    model = EXACT[name]()
    V = random(weights(model), *columns)
    rows = [(torch.cat(x.unbind()), t) for x, t in operator(model).risk._data]
    flat = HessianOperator(model, lambda o, t: o.square().mean(), rows, average=BATCHES)
    expected, tolerance = flat @ V, 1e-12 if TWICE else DIFFERENCE
    told = nullcontext() if TWICE else pytest.warns(UserWarning, match="using FiniteDifference")
    for H in (operator(model), operator(model).linearize()):
        with told:
            product = H @ V
        torch.testing.assert_close(product, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ONCE)
def test_what_torch_differentiates_once_goes_by_differences_with_a_warning(name: str) -> None:
    model = ONCE[name]()
    v = random(weights(model))
    expected = operator(model, strategy=FiniteDifference()) @ v
    for make in (lambda H: H, lambda H: H.linearize()):
        with pytest.warns(UserWarning, match=r"using FiniteDifference\(\) for this operator"):
            product = make(operator(model)) @ v
        torch.testing.assert_close(product, expected, rtol=DIFFERENCE, atol=DIFFERENCE)


def test_nested_tensors_of_the_older_layout_go_by_differences() -> None:
    model = seeded(nn.Linear(4, 3))
    data = [(nested(2, 3, layout=torch.strided), torch.zeros(2))]
    v = random(weights(model))
    rows = [(torch.nested.to_padded_tensor(data[0][0], 0.0), data[0][1])]
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]], dtype=D)[..., None]
    dense = HessianOperator(model, lambda o, t: (o * mask).square().mean(), rows, average=BATCHES)
    for make in (lambda H: H, lambda H: H.linearize()):
        with pytest.warns(UserWarning, match=r"using FiniteDifference\(\) for this operator"):
            product = make(operator(model, loss=padded, data=data)) @ v
        torch.testing.assert_close(product, dense @ v, rtol=DIFFERENCE, atol=DIFFERENCE)


def test_an_explicit_strategy_says_what_fails() -> None:
    model = ONCE["layer norm"]()
    with pytest.raises(NoSecondDerivativeError, match="torch's derivative of an op fails"):
        operator(model, strategy=ReverseOverReverse()) @ random(weights(model))


def test_what_torch_cannot_differentiate_even_once_is_told_so() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh().mean(1)

    H = operator(Pooled(), loss=lambda o, t: o.square().mean())
    warned = pytest.warns(UserWarning, match="no such derivative; using FiniteDifference")
    with warned, pytest.raises(NoDerivativeError, match="pad what is nested"):
        H @ random(15)


def test_a_hook_that_fails_is_not_taken_for_a_missing_derivative() -> None:
    class Refusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)

            def refuse(gradient: Tensor) -> None:
                raise RuntimeError("not this one")

            y.register_hook(refuse)
            return y

    H = HessianOperator(
        Refusing(), lambda o, t: o.square().mean(), [(random(3, 4), torch.zeros(3))]
    )
    with pytest.raises(RuntimeError, match="not this one"):
        H @ random(15)
