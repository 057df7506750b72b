"""What a loss closes over keeps its gradient through an examination."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvpop import HessianOperator


def test_check_leaves_the_gradients_of_closed_over_tensors_alone() -> None:
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    fresh = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    scale.grad = torch.tensor(7.0, dtype=torch.float64)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * fresh * (outputs - targets).square().mean()

    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    model = nn.Linear(3, 1).double()
    assert HessianOperator(model, loss, [(x, x[:, :1])]).check().healthy
    assert scale.grad.item() == 7.0
    assert fresh.grad is None
