"""Small problems that the tests of this folder share, and what their Hessians must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers from a seed of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes(*shape: int, of: int = 3, seed: int = 0) -> Tensor:
    """Return class indices from a seed of their own."""
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(seed))


def set_parameters(model: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """Give every parameter normal values, without a look at the global random numbers."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(scale * random(*p.shape, seed=100 * seed + i).to(p))
    return model


def mlp(
    inputs: int = 4, hidden: int = 5, outputs: int = 3, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Return a small smooth network."""
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    set_parameters(model.to(dtype))
    return model


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return (self.scale * out - y).square().mean()


def regression(n: int = 23, *, seed: int = 1) -> Pair:
    """Return inputs (n, 4) and targets (n, 3)."""
    return random(n, 4, seed=seed), random(n, 3, seed=seed + 50)


def split(data: Sequence[Tensor], sizes: Iterable[int]) -> list[tuple[Tensor, ...]]:
    """Return a data set in batches of the given sizes."""
    return list(zip(*(t.split(list(sizes)) for t in data), strict=True))


def dense_hessian(model: nn.Module, value: Callable[[], Tensor]) -> Tensor:
    """Return the Hessian (n, n) of ``value()`` by plain double backward, row by row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value(), parameters, create_graph=True, allow_unused=True)
    flat = torch.cat(
        [
            torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )
    rows = []
    for entry in flat:
        row = [None] * len(parameters)
        if entry.requires_grad:
            row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=p.dtype) if r is None else r.reshape(-1)
                    for r, p in zip(row, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows).detach()


def error(found: Any, expected: Any) -> float:
    """Return the difference relative to what is expected."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    scale = expected.double().norm().item()
    assert scale > 0
    return (found.double() - expected.double()).norm().item() / scale
