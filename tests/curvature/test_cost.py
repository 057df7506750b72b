"""What `cost` tells before the products is what they then keep and take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvpop import GaussNewtonOperator, HessianOperator


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_what_would_be_kept_is_what_is_kept(kind: type[HessianOperator]) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).double()
    x, y = torch.randn(230, 16).double(), torch.randint(4, (230,))
    H = kind(model, nn.CrossEntropyLoss(), list(zip(x.split(50), y.split(50), strict=True)))
    told = H.cost()
    kept = H.linearize().report()
    assert (told.parameters, told.batches) == (H.shape[0], 5)
    assert told.data_bytes == x.nbytes + y.nbytes + 5 * 8  # a seed beside each batch
    assert told.kept_bytes is not None
    # graphs are measured for two shapes; joined they hold what is not of a batch once
    assert kept.bytes <= told.kept_bytes <= 1.25 * kept.bytes
    assert told.fits
    assert told.vector_bytes == 8 * H.shape[0]
    assert told.seconds > 0
    assert told.estimate(10) == 10 * told.seconds
    assert "a product is a pass" in str(told)


def test_a_linearized_operator_tells_the_same_memory() -> None:
    H = HessianOperator(nn.Linear(3, 2), nn.MSELoss(), [(torch.ones(4, 3), torch.ones(4, 2))])
    live, frozen = H.cost(), H.linearize().cost()
    assert (live.kept_bytes, live.batches) == (frozen.kept_bytes, frozen.batches)
