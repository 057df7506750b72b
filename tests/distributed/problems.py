"""A model, and data in shards, of which every process takes its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvpop import (
    BATCHES,
    SAMPLES,
    TOTAL,
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
)

AVERAGES = {"SAMPLES": SAMPLES, "BATCHES": BATCHES, "TOTAL": TOTAL}
MATRICES: dict[str, Any] = {
    "Hessian": HessianOperator,
    "Gauss-Newton": GaussNewtonOperator,
    "Fisher": FisherOperator,
    "empirical Fisher": EmpiricalFisherOperator,
}
"""Every matrix that averages over data."""

X = torch.randn(37, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (37,), generator=torch.Generator().manual_seed(1))

SIZES: dict[str, list[list[int]]] = {
    "equal": [[4, 4], [4, 4], [4, 4], [4, 4]],
    "ragged": [[5, 5, 3], [12], [4, 3, 1], [4]],
    "empty": [[10, 3], [], [7], []],
}
"""Batches of each of four shards."""


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def shards(sizes: str) -> list[list[tuple[Tensor, Tensor]]]:
    found, start = [], 0
    for batches in SIZES[sizes]:
        found.append([])
        for size in batches:
            found[-1].append((X[start : start + size], Y[start : start + size]))
            start += size
    return found


def held(sizes: str, rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of one process: shards are dealt out to those that there are."""
    return [batch for shard in shards(sizes)[rank::ranks] for batch in shard]


def whole(sizes: str) -> list[tuple[Tensor, Tensor]]:
    return [batch for shard in shards(sizes) for batch in shard]


def columns(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, k, generator=generator, dtype=torch.float64)


def dense(name: str, data: list[tuple[Tensor, Tensor]], average: str) -> np.ndarray:
    """The matrix by double backward through plain torch, batch by batch."""
    net = model()
    shapes = [(n, p.shape) for n, p in net.named_parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def outputs(w: Tensor, x: Tensor) -> Tensor:
        pieces = dict(
            zip(
                (n for n, _ in shapes),
                (
                    t.reshape(s)
                    for t, (_, s) in zip(
                        w.split([s.numel() for _, s in shapes]), shapes, strict=True
                    )
                ),
                strict=True,
            )
        )
        result: Tensor = torch.func.functional_call(net, pieces, (x,))
        return result

    total, weight = torch.zeros(len(flat), len(flat), dtype=torch.float64), 0.0
    for x, y in data:
        if name == "Hessian":
            matrix = torch.autograd.functional.hessian(
                lambda w, x=x, y=y: nn.functional.cross_entropy(outputs(w, x), y), flat
            )
        else:
            z = outputs(flat, x)
            J = torch.autograd.functional.jacobian(lambda w, x=x: outputs(w, x), flat)
            p = z.softmax(1)
            B = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            if name == "empirical Fisher":
                g = p - nn.functional.one_hot(y, p.shape[1])
                B = g[:, :, None] * g[:, None, :]
            matrix = torch.einsum("ncm,ncd,ndk->mk", J, B, J) / len(x)
        w = {"SAMPLES": float(len(x)), "BATCHES": 1.0, "TOTAL": 1.0}[average]
        total, weight = total + w * matrix, weight + w
    return (total if average == "TOTAL" else total / weight).numpy()
