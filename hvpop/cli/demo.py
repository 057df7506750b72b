"""A model to look at with nothing given: a small network trained on handwritten digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .target import UsageError


def digits(seed: int) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A 64-16-10 network in float64, its loss, and 1797 images in batches of 256."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("the demo needs scikit-learn: pip install 'hvpop[cli]'") from error
    found: Any = load_digits()
    images = torch.as_tensor(found.data).double() / 16
    labels = torch.as_tensor(found.target).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=30)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(model(images), labels)
        value.backward()
        return value

    optimizer.step(closure)
    return model, loss, list(zip(images.split(256), labels.split(256), strict=True))
