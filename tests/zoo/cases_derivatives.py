"""Cases: custom functions, and gradients inside the model or the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.functions import Cube, CubeOnce

from .cases_functions import between
from .ingredients import mlp, regression
from .registry import Problem, case


class NewStyle(torch.autograd.Function):
    """An exponential with ``setup_context``, that saves its output."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grads[0] * y


class ForwardToo(NewStyle):
    """One that knows its forward derivative as well."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return tangents[0] * y


class BackwardIsAFunction(torch.autograd.Function):
    """A sine whose backward is a custom function of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return CosineTimes.apply(grads[0], x)


class CosineTimes(torch.autograd.Function):
    """``g cos(x)``, with its derivative written out."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return g * x.cos()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        return grads[0] * x.cos(), -grads[0] * g * x.sin()


FUNCTIONS: dict[str, Any] = {
    "function_old_style": Cube,
    "function_new_style": NewStyle,
    "function_with_jvp": ForwardToo,
    "function_with_custom_backward": BackwardIsAFunction,
}
for _name, _kind in FUNCTIONS.items():
    case(_name)(lambda kind=_kind: between(kind.apply))
case("function_once_differentiable", refused="once_differentiable")(lambda: between(CubeOnce.apply))


# -- derivatives inside the model -----------------------------------------------------------------


def pinn_residual(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend + u.sin() - x).square().mean()


@case("physics_informed")
def physics_informed() -> Problem:
    data = [(x, y) for x, y in regression(1, outputs=(1,))]
    return Problem(mlp(1, 5, 1), data, batch_loss=lambda m, batch: pinn_residual(m, batch[0]))


@case("gradient_penalty")
def gradient_penalty() -> Problem:
    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean() + model(batch[0]).mean()

    data = [(x.clone(), y) for x, y in regression(4)]

    def private(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch_loss(model, (batch[0].detach().clone(), batch[1]))

    return Problem(mlp(4, 5, 1), data, batch_loss=private)


@case("energy_and_forces")
def energy_and_forces() -> Problem:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = mlp(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                energy = self.energy(x).sum()
                return -torch.autograd.grad(energy, x, create_graph=True)[0]

    return Problem(Forces(), regression(4, outputs=(4,)), nn.MSELoss())


@case("forces_by_functorch")
def forces_by_functorch() -> Problem:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = mlp(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            force: Tensor = torch.func.grad(lambda z: self.energy(z).sum())(x)
            return force

    return Problem(Forces(), regression(4, outputs=(4,)), nn.MSELoss())


@case("inner_gradient_step")
def inner_gradient_step() -> Problem:
    class Maml(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learner = mlp(4, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            start = dict(self.learner.named_parameters())
            inner = torch.func.functional_call(self.learner, start, (x[:2],)).square().mean()
            slopes = torch.autograd.grad(inner, list(start.values()), create_graph=True)
            step = {n: p - 0.1 * g for (n, p), g in zip(start.items(), slopes, strict=True)}
            return torch.func.functional_call(self.learner, step, (x,))

    return Problem(Maml(), regression(4), nn.MSELoss())
