"""Where the Hessian is a matter of convention, every strategy keeps to the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from hvpop import FiniteDifference, ForwardOverReverse, HessianOperator

from .problems import EXACT, Apply, classes, error, labelled, mlp, truth, vector
from .sick import Padded, straight_through, without_grad

LOSS = nn.CrossEntropyLoss()


def products(model: nn.Module, x: Tensor, y: Tensor, loss: Any = LOSS) -> list[Tensor]:
    """Return ``H v`` by reverse, forward and finite differences."""
    v = vector(model)
    strategies = (None, ForwardOverReverse(), FiniteDifference())
    return [HessianOperator(model, loss, [(x, y)], strategy=s) @ v for s in strategies]


def test_a_relu_network_has_the_hessian_of_its_linear_piece() -> None:
    model, (x, y) = nn.Sequential(mlp(4, 6, 6), nn.ReLU(), mlp(6, 4, 3)), labelled()
    reverse, forward, difference = products(model, x, y)
    with torch.no_grad():
        mask = (model[0](x) > 0).double()
    piece = nn.Sequential(model[0], Apply(lambda h: h * mask), model[2])
    expected = truth(piece, x, y) @ vector(model)
    assert error(reverse, expected) < EXACT
    assert error(forward, expected) < EXACT
    assert error(difference, expected) < 1e-7


def at_zero(x: Tensor) -> Tensor:
    return torch.relu(x - x.detach())


def test_a_relu_exactly_at_its_kink_is_flat() -> None:
    model, (x, y) = nn.Sequential(mlp(4, 6, 6), Apply(at_zero), mlp(6, 4, 3)), labelled()
    reverse, forward, _ = products(model, x, y)
    assert error(forward, reverse) < EXACT
    assert reverse.isfinite().all()
    size = sum(p.numel() for p in model[0].parameters())
    assert reverse[:size].norm() == 0  # torch's own derivative of relu at zero is zero


@pytest.mark.parametrize(
    "stop",
    [lambda x: x * torch.sigmoid(x).detach(), without_grad, straight_through],
    ids=["detach", "no_grad", "straight_through"],
)
def test_what_stops_gradients_is_constant_by_every_strategy(
    stop: Callable[[Tensor], Tensor],
) -> None:
    model, (x, y) = nn.Sequential(mlp(4, 6, 6), Apply(stop), mlp(6, 4, 3)), labelled()
    reverse, forward, difference = products(model, x, y)
    assert error(reverse, truth(model, x, y) @ vector(model)) < EXACT
    assert error(forward, reverse) < EXACT
    assert error(difference, reverse) > 0.01  # differences see it move


def test_the_padding_row_is_constant_by_every_strategy() -> None:
    model, x, y = Padded(), classes(9, 5, of=7), classes(9)
    x[:, 0] = 0
    reverse, forward, difference = products(model, x, y)
    assert reverse[:4].norm() == 0
    assert error(forward, reverse) < EXACT
    assert error(difference, reverse) > 0.01


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(6, dtype=torch.float64),
    "batch": lambda: nn.BatchNorm1d(6, track_running_stats=False, dtype=torch.float64),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, affine=True, dtype=torch.float64),
        nn.Flatten(),
    ),
}


@pytest.mark.parametrize("kind", NORMS)
def test_normalization_is_differentiated_through_its_statistics(kind: str) -> None:
    model = nn.Sequential(mlp(4, 6, 6), NORMS[kind](), nn.Tanh(), mlp(6, 4, 3))
    (x, y), v = labelled(), vector(model)
    reverse, forward, difference = products(model, x, y)
    assert error(reverse, difference) < 1e-7
    assert error(forward, reverse) < EXACT
    assert error(by_torch(model, x, y) @ v, reverse) > 1e-3  # jvp(jacrev) holds them constant


def by_torch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian (n, n) by `torch.func.hessian`."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([t.numel() for t in tensors.values()])
        shaped = {n: p.view_as(tensors[n]) for n, p in zip(tensors, parts, strict=True)}
        return F.cross_entropy(functional_call(model, shaped, (x,)), y)

    return hessian(value)(torch.cat([t.reshape(-1) for t in tensors.values()])).detach()


def test_a_scaled_loss_has_a_scaled_hessian() -> None:
    model, (x, y) = mlp(), labelled()
    scaler, v = torch.amp.GradScaler("cpu", init_scale=2.0**16), vector(model)
    scaled = HessianOperator(model, lambda z, t: scaler.scale(F.cross_entropy(z, t)), [(x, y)])
    assert error(scaled @ v / 2**16, truth(model, x, y) @ v) < EXACT
