"""Losses that use forward mode themselves: time derivatives of flows, tangents of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hvpop import HessianOperator
from hvpop.risk import EmpiricalRisk

from .problems import random

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


def by_functorch(model: nn.Module, batch: Any) -> Tensor:
    x, direction = batch
    u, du = torch.func.jvp(model, (x,), (direction,))
    return (u + 0.5 * du).square().mean()


def by_dual_numbers(model: nn.Module, batch: Any) -> Tensor:
    with forward_ad.dual_level():
        u = forward_ad.unpack_dual(model(forward_ad.make_dual(*batch)))
        return (u.primal + 0.5 * u.tangent).square().mean()


def by_hand(model: nn.Module, batch: Any) -> Tensor:
    first, _, second = model
    x, direction = batch
    h = first(x).tanh()
    tangent = (direction @ first.weight.mT) * (1 - h.square())
    return (second(h) + 0.5 * tangent @ second.weight.mT).square().mean()


@pytest.mark.parametrize("batch_loss", [by_functorch, by_dual_numbers])
@pytest.mark.parametrize("columns", [(), (3,)])
def test_a_product_is_that_of_the_tangent_written_out(
    batch_loss: Any, columns: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(random(6, 3, seed=1), random(6, 3, seed=2))]
    V = random(38, *columns)
    H, truth = (
        HessianOperator.from_risk(EmpiricalRisk.from_batch_loss(model, loss, data))
        for loss in (batch_loss, by_hand)
    )
    for operator in (H, H.linearize(), H.linearize(memory=0)):
        torch.testing.assert_close(operator @ V, truth @ V, rtol=1e-11, atol=1e-12)
