"""Recurrent layers run without cuDNN, and nothing else about it changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hvpop import HessianOperator
from hvpop.risk.formulas.recurrent import without_cudnn

OPS = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        projected = (
            {"proj_size": 3} if kind == "LSTM" else {}
        )  # others have formulas, and call nothing
        self.layer: nn.RNNBase = getattr(nn, kind)(3, 4, batch_first=True, **projected)
        self.head = nn.Linear(projected.get("proj_size", 4), 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x)[0][:, -1])


class Watch(TorchFunctionMode):
    """Notes whether cuDNN is on whenever a recurrent op runs."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPS:
            self.enabled.append(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


def hessian(kind: str) -> HessianOperator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = torch.randn(5, 6, 3).double(), torch.randint(2, (5,))
        return HessianOperator(Model(kind).double(), nn.CrossEntropyLoss(), [batch])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_products_and_the_doctor_run_without_cudnn(kind: str) -> None:
    H = hessian(kind)
    for use in (lambda: H @ torch.ones(H.shape[0]).double(), H.check):
        with Watch() as watch:
            use()
        assert watch.enabled
        assert not any(watch.enabled)
        assert torch.backends.cudnn.enabled


def test_it_is_on_again_after_an_error() -> None:
    with pytest.raises(KeyError), without_cudnn():
        raise KeyError
    assert torch.backends.cudnn.enabled


@pytest.fixture(params=["conv", "rnn"])
def _precise(request: pytest.FixtureRequest) -> Iterator[None]:
    backend = getattr(torch.backends.cudnn, request.param, None)
    if backend is None:
        pytest.skip("each kind of op has a precision of its own since torch 2.9")
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    yield
    backend.fp32_precision = before


@pytest.mark.usefixtures("_precise")
def test_users_may_choose_the_precision_of_cudnn() -> None:
    H = hessian("LSTM")
    assert torch.isfinite(H @ torch.ones(H.shape[0]).double()).all()
