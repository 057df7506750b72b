"""Batches and scaffolds that the cases share: two unequal batches, few parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .registry import Problem

SIZES = (6, 4)
Pair = tuple[Tensor, Tensor]


def regression(*shape: int, outputs: tuple[int, ...] = (2,)) -> list[Pair]:
    """Return batches of normal inputs (b, *shape) and targets (b, *outputs)."""
    return [(torch.randn(b, *shape), torch.randn(b, *outputs)) for b in SIZES]


def classification(*shape: int, classes: int = 3) -> list[Pair]:
    """Return batches of normal inputs (b, *shape) and class indices (b,)."""
    return [(torch.randn(b, *shape), torch.randint(classes, (b,))) for b in SIZES]


def tokens(length: int = 5, vocabulary: int = 7, classes: int = 3) -> list[Pair]:
    """Return batches of token indices (b, length) and class indices (b,)."""
    return [(torch.randint(vocabulary, (b, length)), torch.randint(classes, (b,))) for b in SIZES]


def is_twice_differentiable(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether the torch at hand has the second derivative of a function of rows (b, 9)."""
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(2, 9).requires_grad_()
    try:
        gradient = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
        gradient.sum().backward()
    except RuntimeError:
        return False
    return True


class Apply(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def head(body: nn.Module, *shape: int) -> nn.Sequential:
    """Return the body with a linear head of two outputs behind it."""
    modes = [(module, module.training) for module in body.modules()]
    with torch.no_grad():
        width = body.eval()(torch.randn(2, *shape)).flatten(1).shape[1]
    for module, mode in modes:  # each its own
        module.training = mode
    return nn.Sequential(body, nn.Flatten(), nn.Linear(width, 2))


def least_squares(body: nn.Module, *shape: int) -> Problem:
    """Return the regression of two outputs on the body's features."""
    return Problem(head(body, *shape), regression(*shape), nn.MSELoss())


def through(make: Callable[[], nn.Module], *shape: int) -> Problem:
    """Return a regression through the layer and a tanh, so that the layer's own block counts."""
    return least_squares(nn.Sequential(make(), nn.Tanh()), *shape)


def features(dims: int) -> nn.Sequential:
    """Return a smooth convolution of two channels to three, in one to three dimensions."""
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(convolution(2, 3, 3, padding=1), nn.Tanh())


def after(make: Callable[[], nn.Module], *shape: int) -> Problem:
    """Return a regression with the layer behind a smooth convolution."""
    return least_squares(nn.Sequential(features(len(shape) - 1), make(), nn.Tanh()), *shape)


def mlp(inputs: int = 4, hidden: int = 5, outputs: int = 3) -> nn.Sequential:
    """Return the small smooth network that most cases decorate."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
