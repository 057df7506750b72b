"""A small operator and its analysis, made once."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from hvpop import HessianOperator
from hvpop.report import Analysis, analyze


def operator() -> HessianOperator:
    """Of a 3-6-2 network on 40 samples in batches of 16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        x, y = torch.randn(40, 3).double(), torch.randint(2, (40,))
    data = list(zip(x.split(16), y.split(16), strict=True))
    return HessianOperator(model, nn.CrossEntropyLoss(), data)


@cache
def analysis() -> Analysis:
    return analyze(operator(), k=2, seed=1)
