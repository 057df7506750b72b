"""A small network and its Hessian, which the tests of this folder share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hvpop import HessianOperator
from tests.curvature.problems import random, set_parameters


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = set_parameters(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    return model, [(random(n, 3, seed=n), random(n, 2, seed=9 + n)) for n in (5, 3)]


def hessian(strategy: Any, loss: Any = None) -> HessianOperator:
    model, data = small()
    return HessianOperator(model, loss or nn.MSELoss(), data, strategy=strategy)
