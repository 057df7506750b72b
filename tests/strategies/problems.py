"""A small network and its Hessian, which the tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hvpop import HessianOperator


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * random(*p.shape, seed=i))
    return model, [(random(n, 3, seed=n), random(n, 2, seed=9 + n)) for n in (5, 3)]


def hessian(strategy: Any, loss: Any = None) -> HessianOperator:
    model, data = small()
    return HessianOperator(model, loss or nn.MSELoss(), data, strategy=strategy)
