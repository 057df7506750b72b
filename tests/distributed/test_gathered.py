"""Models sharded by FSDP2: exact while gathered, refused otherwise, untouched afterwards."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hvpop import HessianOperator
from hvpop.distributed import DataParallel, Team, gathered

from . import worlds


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)).double()


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (4,) if kind == "mlp" else (3, 4)
    return [
        (
            torch.randn(5, *shape, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (5,), generator=generator),
        )
        for _ in range(4)
    ]


def sharded(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    model = network(kind).to(dtype)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in list(model):  # type: ignore[arg-type]
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any, data: list[tuple[Tensor, Tensor]]) -> list[np.ndarray]:
    """Two steps, and then the parts of the parameters that are held here."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in data[:2]:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.to_local().detach().numpy().copy() for p in model.parameters()]


def products(team: Team, kind: str) -> Any:
    data = batches(kind)
    mine = data[:3] if team.rank == 0 else data[3:]  # three against one
    untouched = trained(sharded(kind), data)
    model = sharded(kind)
    found = {}
    with gathered(model):
        H = DataParallel(HessianOperator(model, nn.CrossEntropyLoss(), mine))
        A = H.linearize()
        for k in (1, 8):
            V = torch.randn(H.shape[0], k, generator=torch.Generator().manual_seed(k)).double()
            found["live", k], found["linearized", k] = (H @ V).numpy(), (A @ V).numpy()
    found["afterwards", 8] = (A @ V).numpy()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="gathered"):
        H @ V
    steps = trained(model, data)
    same = all((a == b).all() for a, b in zip(steps, untouched, strict=True))
    return found, same


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_model_is_exact_while_gathered_and_trains_on_as_it_would_have(kind: str) -> None:
    results = worlds.all_of(products, 2, kind)
    H = HessianOperator(network(kind), nn.CrossEntropyLoss(), batches(kind))
    for found, same in results:
        for (_, k), Z in found.items():
            V = torch.randn(H.shape[0], k, generator=torch.Generator().manual_seed(k)).double()
            expected = (H @ V).numpy()
            np.testing.assert_allclose(Z, expected, rtol=0, atol=1e-12 * abs(expected).max())
        assert same


def not_gathered(team: Team) -> None:
    HessianOperator(sharded("transformer"), nn.CrossEntropyLoss(), batches("transformer"))


def test_a_sharded_model_is_refused_with_what_to_do() -> None:
    for outcome in worlds.run(not_gathered, 2):
        assert outcome.error == "TypeError"
        assert "with hvpop.distributed.gathered(model)" in outcome.message
        assert "ShardedModelHessian(risk, FiniteDifference())" in outcome.message


def test_a_model_that_is_not_sharded_is_left_alone() -> None:
    model = network("mlp")
    before = copy.deepcopy(model.state_dict())
    with gathered(model) as same:
        assert same is model
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
