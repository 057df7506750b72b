"""While a backward pass runs, the model holds the point; what its author wrote is held against differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import (
    FiniteDifference,
    ForwardOverReverse,
    GaussNewtonOperator,
    HessianOperator,
    JacobianOperator,
    ReverseOverReverse,
)
from hvpop.risk import EmpiricalRisk
from hvpop.strategies import NoSecondDerivativeError
from tests.functions import Cube, SavedSine, SineByNumpy

from .problems import Apply, error, random, set_parameters

DIFFERENCE = 1e-6
"""Two gradients' differences, of second and fourth order, at steps of about 1e-5 and 1e-3."""


class Again(torch.autograd.Function):
    """A checkpoint of one's own, as diffusion models have it: the backward pass runs the block again."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        return (None, *torch.autograd.grad(y, (x, *ctx.parameters), g, allow_unused=True))


class Adding(Again):
    """A reversible block: its backward pass calls ``backward()``, and gives its parameters nothing."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(g)
        return (None, x.grad, *[None] * len(ctx.parameters))


class Through(torch.autograd.Function):
    """Rounds, and lets gradients pass: not the derivative of anything, by intent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Block(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(lambda x: torch.tanh(self.inner(x)), x, *self.parameters())


class Cached(nn.Module):
    """Embeds without a graph, and hands the gradient on in a hook of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.net(x)
        z.requires_grad_()
        with torch.enable_grad():
            loss = z.square().square().mean()
            (dz,) = torch.autograd.grad(loss, z)
        out = loss.detach().requires_grad_()

        def hook(g: Tensor) -> None:
            with torch.enable_grad():
                (self.net(x) * dz * g).sum().backward()

        out.register_hook(hook)
        return out


X, Y = random(8, 3), random(8, 1, seed=1)


def model(first: nn.Module) -> nn.Sequential:
    return set_parameters(nn.Sequential(first, nn.Linear(3, 1)).double())


BLIND: dict[str, Callable[[], nn.Module]] = {
    "a checkpoint of one's own": lambda: model(Block(Again)),
    "a reversible block": lambda: model(Block(Adding)),
    "a saved derivative": lambda: model(nn.Sequential(nn.Linear(3, 3), Apply(SavedSine.apply))),
    "NumPy": lambda: model(nn.Sequential(nn.Linear(3, 3), Apply(SineByNumpy.apply))),
}


def truth(net: nn.Module, v: Tensor, loss: Callable[[], Tensor], h: float = 1e-3) -> Tensor:
    """Fourth-order differences of the gradients that ``backward()`` leaves in a copy of the model."""
    parameters = list(net.parameters())
    point = torch.cat([p.detach().reshape(-1) for p in parameters])
    kept = [p.grad for p in parameters]

    def at(t: float) -> Tensor:
        nn.utils.vector_to_parameters(point + t * v, parameters)
        for p in parameters:
            p.grad = None
        loss().backward()
        return torch.cat([p.grad.reshape(-1) for p in parameters])  # type: ignore[union-attr]

    found = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    nn.utils.vector_to_parameters(point, parameters)
    for p, grad in zip(parameters, kept, strict=True):
        p.grad = grad
    return found


@pytest.mark.parametrize("linearize", [False, True], ids=["live", "linearized"])
@pytest.mark.parametrize("name", BLIND)
def test_a_backward_pass_without_a_graph_is_told_and_differentiated_by_differences(
    name: str, linearize: bool
) -> None:
    net = BLIND[name]()
    v = random(sum(p.numel() for p in net.parameters()))
    H = HessianOperator(net, nn.MSELoss(), [(X, Y)])
    with pytest.warns(UserWarning, match=r"using FiniteDifference\(\)"):
        product = (H.linearize() if linearize else H) @ v
    expected = truth(net, v, lambda: F.mse_loss(net(X), Y))
    assert error(product, expected) < DIFFERENCE
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("strategy", [ReverseOverReverse(), ForwardOverReverse()], ids=repr)
@pytest.mark.parametrize("name", BLIND)
def test_a_strategy_that_was_asked_for_refuses_it(name: str, strategy: Any) -> None:
    net = BLIND[name]()
    H = HessianOperator(net, nn.MSELoss(), [(X, Y)], strategy=strategy)
    for A in (H, H.linearize()):
        with pytest.raises(NoSecondDerivativeError):
            A @ random(H.shape[1])


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", BLIND)
def test_first_derivatives_are_those_at_the_point_wherever_the_model_has_gone(
    name: str, moved: bool
) -> None:
    net = BLIND[name]()
    A = HessianOperator(net, nn.MSELoss(), [(X, Y)], strategy=FiniteDifference()).linearize()
    v = random(A.shape[1])
    expected = truth(net, v, lambda: F.mse_loss(net(X), Y))
    if moved:
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(2.0)
    assert error(A @ v, expected) < DIFFERENCE


def test_a_loss_that_is_a_leaf_with_a_hook_is_not_taken_for_a_constant() -> None:
    net = set_parameters(Cached().double())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    risk = EmpiricalRisk.from_batch_loss(net, lambda m, x: m(x), [X])
    v = random(sum(p.numel() for p in net.parameters()))
    with pytest.warns(UserWarning, match="the loss is a leaf"):
        product = HessianOperator.from_risk(risk) @ v
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())  # type: ignore[arg-type]
    expected = truth(net, v, lambda: net.net(X).square().square().mean())
    assert error(product, expected) < DIFFERENCE


@pytest.mark.parametrize("function", [Cube, Through], ids=lambda f: f.__name__)
def test_a_right_function_and_one_that_stops_gradients_are_left_alone(function: Any) -> None:
    net = model(nn.Sequential(nn.Linear(3, 3), Apply(function.apply)))
    H = HessianOperator(net, nn.MSELoss(), [(X, Y)])
    v = random(H.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product = H @ v
        assert error(H.linearize() @ v, product) < 1e-12
    assert repr(H.strategy) == "ReverseOverReverse()"


def test_a_gradient_penalty_over_parameters_listed_before_counts_at_the_point() -> None:
    net = set_parameters(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    listed = list(net.parameters())

    def loss(out: Tensor, y: Tensor) -> Tensor:
        mean = F.mse_loss(out, y)
        gradient = torch.autograd.grad(mean, listed, create_graph=True)
        return mean + 0.3 * sum(g.square().sum() for g in gradient)  # type: ignore[return-value]

    v = random(sum(p.numel() for p in listed))
    A = HessianOperator(net, loss, [(X, Y)]).linearize()
    expected = truth(net, v, lambda: loss(net(X), Y))
    with torch.no_grad():
        for p in listed:
            p.mul_(0.5)
    assert error(A @ v, expected) < DIFFERENCE


def test_random_numbers_that_are_drawn_only_later_start_from_the_seed_too() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or np.random.rand() < 0.8:
                    x = x + layer(x).tanh()
            return x

    net = set_parameters(Skipping().double()).eval()
    H = HessianOperator(net, nn.MSELoss(), [(X, X)])
    v = random(H.shape[1])
    H @ v
    net.train()
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    first = H @ v
    assert torch.equal(H @ v, first)
    assert torch.equal(first, HessianOperator(net, nn.MSELoss(), [(X, X)]) @ v)
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index,union-attr]


def test_what_function_transforms_differentiate_by_is_the_point_too() -> None:
    net = set_parameters(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    weight = net[0].weight

    def loss(out: Tensor, y: Tensor) -> Tensor:
        inner = torch.func.grad(lambda w: (X @ w.T).sin().square().mean())(weight)
        return F.mse_loss(out, y) + inner.square().sum()

    v = random(sum(p.numel() for p in net.parameters()))
    A = HessianOperator(net, loss, [(X, Y)]).linearize()
    expected = truth(net, v, lambda: loss(net(X), Y))
    with torch.no_grad():
        weight.mul_(0.5)
    assert error(A @ v, expected) < DIFFERENCE


# -- Jacobians that authors write ----------------------------------------------------------------------


class Hooked(nn.Module):
    """A layer whose gradients a hook changes."""

    def __init__(self, hook: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.hook = nn.Linear(3, 3), hook

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if h.requires_grad:
            h.register_hook(self.hook)
        return h.tanh()


class WrongTangent(Through):
    """Its jvp says twice what its backward pass does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 2 * t


class Halving(Through):
    """Half of what its derivative is, as gradients that are scaled down on purpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2


WRITTEN: dict[str, Callable[[], nn.Module]] = {
    "rounding that lets gradients through": lambda: Apply(Through.apply),
    "gradients that are scaled": lambda: Apply(Halving.apply),
    "a hook that scales": lambda: Hooked(lambda g: 2 * g),
}


def pulled(net: nn.Module) -> Tensor:
    """The Jacobian by its rows, each a pull-back."""
    parameters, rows = list(net.parameters()), []
    for z in net(X).reshape(-1):
        found = torch.autograd.grad(z, parameters, retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("strategy", [None, ReverseOverReverse()])
def test_a_jacobian_by_its_authors_will_is_taken_as_it_is_written(name: str, strategy: Any) -> None:
    net = model(nn.Sequential(nn.Linear(3, 3), WRITTEN[name]()))
    J, v = pulled(net), random(J_SIZE[name])
    G = GaussNewtonOperator(net, nn.MSELoss(), [(X, Y)], strategy=strategy)
    own = JacobianOperator(net, [(X, Y)], strategy=strategy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert error(G @ v, 2 / len(J) * J.T @ (J @ v)) < 1e-12
            assert error(own @ v, J @ v) < 1e-12
        assert error(own.T @ (own @ v), J.T @ (J @ v)) < 1e-12


J_SIZE = dict.fromkeys(WRITTEN, 16) | {"a hook that scales": 28}


@pytest.mark.parametrize(
    ("layer", "strategy"),
    [
        (lambda: Apply(Through.apply), FiniteDifference()),
        (lambda: Apply(Halving.apply), FiniteDifference()),
        (lambda: Hooked(lambda g: 2 * g), FiniteDifference()),
        (lambda: Hooked(lambda g: 2 * g), ForwardOverReverse()),
        (lambda: Apply(WrongTangent.apply), ForwardOverReverse()),
        (lambda: Hooked(lambda g: g / g.norm()), None),
    ],
)
def test_tangents_of_which_a_pull_back_is_no_transpose_are_refused(
    layer: Callable[[], nn.Module], strategy: Any
) -> None:
    net = model(nn.Sequential(nn.Linear(3, 3), layer()))
    n = sum(p.numel() for p in net.parameters())
    G = GaussNewtonOperator(net, nn.MSELoss(), [(X, Y)], strategy=strategy)
    J = JacobianOperator(net, [(X, Y)], strategy=strategy)
    for matrix in (G, J):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that differences are taken, which are refused, too
            with pytest.raises(NoSecondDerivativeError, match="not the transpose of J v"):
                matrix @ random(n)
