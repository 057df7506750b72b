"""What each process has of its own: data, random numbers, decisions, memory, parameters, warnings."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from hvpop import SAMPLES, TOTAL, HessianOperator
from hvpop.curvature.memory import FREE_FRACTION, free_memory
from hvpop.distributed import DataParallel, Team

from . import problems, worlds

X, Y = problems.X, problems.Y  # 37 samples, which no number of processes from 2 to 8 divides


def exact(average: str = "SAMPLES") -> np.ndarray:
    return problems.dense("Hessian", [(X, Y)], average)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * abs(expected).max())


def hessian(data: Any, model: nn.Module | None = None, loss: Any = None, **options: Any) -> Any:
    model = model or problems.model()
    return DataParallel(HessianOperator(model, loss or nn.CrossEntropyLoss(), data, **options))


def mine(team: Team, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Every so many-th sample, in batches."""
    x, y = X[team.rank :: team.size], Y[team.rank :: team.size]
    return list(zip(x.split(size), y.split(size), strict=True))


# -- padding ----------------------------------------------------------------------------------------


def by_sampler(team: Team, shuffle: bool, kind: str) -> np.ndarray:
    dataset: Any = TensorDataset(X, Y) if kind == "tensors" else list(zip(X, Y, strict=True))
    sampler = DistributedSampler(dataset, team.size, team.rank, shuffle=shuffle)
    return hessian(DataLoader(dataset, 4, sampler=sampler)).to_dense().numpy()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["tensors", "samples"])
def test_samples_that_a_sampler_repeats_count_once(shuffle: bool, kind: str) -> None:
    for found in worlds.all_of(by_sampler, 4, shuffle, kind):
        close(found, exact())


class BatchSamplerShard(BatchSampler):
    """Deals batches out as accelerate does: every W-th, evened by the first ones again."""

    def __init__(self, sampler: BatchSampler, team: Team) -> None:
        self.batch_sampler, self.team, self.even_batches = sampler, team, True

    def __iter__(self) -> Any:
        batches = list(self.batch_sampler)
        own = batches[self.team.rank :: self.team.size]
        most = -(-len(batches) // self.team.size)
        if self.even_batches and len(own) < most:
            own.append(batches[0])
        return iter(own)


class DataLoaderAdapter:
    def __init__(self, base: Any) -> None:
        self.base_dataloader = base

    def __iter__(self) -> Any:
        raise AssertionError("makes collectives of its own")


class DataLoaderDispatcher(DataLoaderAdapter):
    pass


class _FabricDataLoader:
    def __init__(self, inner: Any) -> None:
        self._dataloader = inner

    def __iter__(self) -> Any:
        return iter(self._dataloader)


class _FabricModule(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._forward_module = self._original_module = inner

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)


def wrapped(team: Team, how: str) -> np.ndarray:
    dataset, model = TensorDataset(X, Y), problems.model()
    if how == "accelerate's":
        batches = BatchSamplerShard(
            BatchSampler(torch.utils.data.SequentialSampler(dataset), 4, False), team
        )
        data: Any = DataLoaderAdapter(DataLoader(dataset, batch_sampler=batches))
        model = DistributedDataParallel(model)  # type: ignore[assignment]
    else:
        sampler = DistributedSampler(dataset, team.size, team.rank)
        data = _FabricDataLoader(DataLoader(dataset, 4, sampler=sampler))
        model = _FabricModule(model)  # type: ignore[assignment]
    return hessian(data, model).to_dense().numpy()


@pytest.mark.parametrize("how", ["accelerate's", "Fabric's"])
def test_wrappers_that_look_like_those_of_libraries_are_looked_through(how: str) -> None:
    for found in worlds.all_of(wrapped, 4, how):
        close(found, exact())


def by_accelerate(team: Team) -> np.ndarray:
    accelerate = importlib.import_module("accelerate")
    dataset = TensorDataset(X, Y)
    accelerator = accelerate.Accelerator(cpu=True)
    model, data = accelerator.prepare(problems.model(), DataLoader(dataset, 4, shuffle=True))
    return hessian(data, model).to_dense().numpy()


def by_fabric(team: Team) -> np.ndarray:
    lightning = importlib.import_module("lightning.fabric")
    fabric = lightning.Fabric(accelerator="cpu", strategy="ddp", devices=team.size)
    fabric.launch()
    model = fabric.setup(problems.model())
    data = fabric.setup_dataloaders(DataLoader(TensorDataset(X, Y), 4, shuffle=True))
    return hessian(data, model).to_dense().numpy()


LIBRARIES = [
    work
    for name, work in (("accelerate", by_accelerate), ("lightning", by_fabric))
    if importlib.util.find_spec(name) is not None
]


@pytest.mark.parametrize("work", LIBRARIES)
def test_what_the_libraries_make_themselves_is_looked_through(work: Any) -> None:
    for found in worlds.all_of(work, 2):  # each of which imports the library
        close(found, exact())


def test_a_loader_that_reads_for_all_is_refused() -> None:
    with pytest.raises(TypeError, match="dispatch_batches=False"):
        HessianOperator(problems.model(), nn.CrossEntropyLoss(), DataLoaderDispatcher([]))


def same_data(team: Team, average: Any) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        H = hessian([(X[:9], Y[:9]), (X[9:], Y[9:])], average=average)
        dense = H.to_dense().numpy()
    return dense, [str(w.message) for w in caught]


def test_data_that_every_process_reads_whole_are_noticed() -> None:
    (found, said), (_, said_by_1) = worlds.all_of(same_data, 2, SAMPLES)
    close(found, exact())
    assert len(said) == 1
    assert "all 2 processes begin with the same batch" in said[0]
    assert said_by_1 == []
    for outcome in worlds.run(same_data, 2, TOTAL):
        assert outcome.error == "RemoteError"
        assert "2 times what it should be" in outcome.message


# -- divisors ---------------------------------------------------------------------------------------


def opaque(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z, y)


def adding(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z, y, reduction="sum")


def one_batch_each(team: Team, how: str) -> None:
    y = Y.clone()
    if how == "ignored":
        y[: 5 * (1 + team.rank)] = -100
    loss = adding if how == "sum" else opaque
    x = X[team.rank :: 2]
    H = hessian([(x, y[team.rank :: 2])], loss=loss)
    H @ problems.columns(H.shape[0], 1)


@pytest.mark.parametrize(("how", "said"), [("ignored", "not ignored"), ("sum", "adds up")])
def test_a_single_batch_a_process_is_weighed_as_many_on_one_are(how: str, said: str) -> None:
    for outcome in worlds.run(one_batch_each, 2, how):
        assert outcome.error == "RemoteError"
        assert said in outcome.message


# -- random numbers, decisions, memory --------------------------------------------------------------


class Masks(nn.Module):
    """Remembers the masks that it drew, by an outer list."""

    def __init__(self, seen: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.seen = [seen]

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones(8, dtype=torch.float64))
        self.seen[0].append(mask.tolist())
        return ((mask * self.weight) ** 2).sum() + x.sum(1)


def masks(team: Team) -> list[list[float]]:
    seen: list[list[float]] = []
    H = hessian(mine(team, 7), Masks(seen), nn.functional.mse_loss)
    data = [(x, torch.zeros(len(x), dtype=torch.float64)) for x, _ in mine(team, 7)]
    H = hessian(data, Masks(seen), nn.functional.mse_loss)
    first, again = (H @ problems.columns(8, 1) for _ in range(2))
    assert torch.equal(first, again)
    return seen


def test_masks_of_dropout_differ_between_processes() -> None:
    one, other = ({tuple(mask) for mask in seen} for seen in worlds.all_of(masks, 2))
    assert len(one) > 1
    assert not one & other


class Once(torch.autograd.Function):
    """Tanh with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * (1 - y.detach().numpy() ** 2))


class Sometimes(nn.Module):
    def __init__(self, once: bool) -> None:
        super().__init__()
        self.inner, self.once = problems.model(), once

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner[0](x)
        h = Once.apply(h) if self.once else h.tanh()
        result: Tensor = self.inner[2](h)
        return result


def falling_back(team: Team, linearized: bool) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        H = hessian(mine(team), Sometimes(team.rank == 1))
        A = H.linearize() if linearized else H
        Z = A @ problems.columns(H.shape[0], 2)
        A @ problems.columns(H.shape[0], 2)
    return repr(H.source.strategy), Z.numpy(), [str(w.message) for w in caught]


@pytest.mark.parametrize("linearized", [False, True])
def test_processes_fall_back_together(linearized: bool) -> None:
    (strategy, Z, said), other = worlds.all_of(falling_back, 2, linearized)
    assert "FiniteDifference" in strategy
    assert strategy == other[0]
    expected = exact() @ problems.columns(43, 2).numpy()
    np.testing.assert_allclose(Z, expected, rtol=0, atol=1e-7 * abs(expected).max())
    assert len(said) == 1
    assert "(on rank 1 of 2 processes)" in said[0]
    assert other[2] == []


def budgets(team: Team) -> tuple[int, int]:
    return hessian(mine(team)).linearize().source._budget, free_memory(torch.device("cpu"))


def test_processes_of_a_machine_share_its_memory() -> None:
    for budget, free in worlds.all_of(budgets, 2):
        assert budget < 0.7 * FREE_FRACTION * free  # half, while others use memory, too


# -- parameters and buffers -------------------------------------------------------------------------


def drifting(team: Team, linearized: bool) -> None:
    model = problems.model()
    H = hessian(mine(team), model)
    v = problems.columns(H.shape[0], 1)
    A = H.linearize() if linearized else H
    A @ v
    if team.rank == 1:
        with torch.no_grad():
            model[0].weight[0, 0] += 1e-9
    A @ v


def test_parameters_that_drift_apart_are_noticed() -> None:
    for outcome in worlds.run(drifting, 2, False):
        assert outcome.error == "RemoteError"
        assert "no longer the same on all processes; broadcast" in outcome.message
    worlds.all_of(drifting, 2, True)  # a linearized one is of its own moment


def unlike(team: Team, what: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    seed, average = 0, SAMPLES
    if team.rank == 1:
        if what == "parameter":
            nn.init.zeros_(model[0].bias)
        elif what == "buffer":
            nn.init.zeros_(model[1].running_var)
        elif what == "seed":
            seed = 3
        elif what == "average":
            average = TOTAL
    if what == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    hessian(mine(team), model, seed=seed, average=average)


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("parameter", "ValueError", "parameter 0.bias differs between rank 0 and rank 1; load"),
        ("buffer", "ValueError", "1.running_var differs between rank 0 and rank 1; broadcast it"),
        ("seed", "ValueError", "seed differs between rank 0 and rank 1: 0 and 3"),
        ("average", "ValueError", "average differs between rank 0 and rank 1: SAMPLES and TOTAL"),
        ("sync", "RemoteError", "SyncBatchNorm in train mode"),
    ],
)
def test_what_differs_is_refused_by_name(what: str, error: str, said: str) -> None:
    for outcome in worlds.run(unlike, 2, what):
        assert outcome.error == error
        assert said in outcome.message


def normed(team: Team) -> np.ndarray:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = list(zip(X.split(5), Y.split(5), strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weighted by their number of samples")
        own = hessian(batches[team.rank :: team.size], model).to_dense()
        alone = HessianOperator(model, nn.CrossEntropyLoss(), batches).to_dense()
    return np.array(float(abs(own - alone).max() / abs(alone).max()))


def test_batchnorm_in_train_mode_is_that_of_the_batches() -> None:
    assert max(worlds.all_of(normed, 2)) < 1e-12


def vectors_differ(team: Team, how: str) -> None:
    H = hessian(mine(team))
    v = problems.columns(H.shape[0], 1 + (how == "width") * team.rank)
    v[0, 0] += (how == "bits") * team.rank * 1e-16 + (how == "bits") * team.rank
    H @ v


@pytest.mark.parametrize(
    ("how", "said"), [("bits", "different vectors"), ("width", "numbers of columns")]
)
def test_processes_that_multiply_different_vectors_are_told(how: str, said: str) -> None:
    for outcome in worlds.run(vectors_differ, 3, how):
        assert outcome.error == "RemoteError"
        assert said in outcome.message


def no_data(team: Team) -> None:
    H = hessian([])
    H @ problems.columns(H.shape[0], 1)


def test_no_data_at_all_is_an_error_everywhere() -> None:
    for outcome in worlds.run(no_data, 2):
        assert outcome.error == "NoDataError"
        assert "no process has a batch" in outcome.message


def forms(team: Team) -> Any:
    H = hessian(mine(team, 4))
    V = problems.columns(H.shape[0], 3)
    found = H.batch_forms(V)
    return found.average().numpy(), found.standard_error().numpy(), H.report()


def test_forms_of_batches_are_those_of_one_process() -> None:
    for team_size in (2, 4):
        average, error, report = worlds.all_of(forms, team_size)[0]
        batches = []
        for rank in range(team_size):
            x, y = X[rank::team_size], Y[rank::team_size]
            batches += list(zip(x.split(4), y.split(4), strict=True))
        alone = HessianOperator(problems.model(), nn.CrossEntropyLoss(), batches)
        expected = alone.batch_forms(problems.columns(43, 3))
        assert expected is not None
        np.testing.assert_allclose(average, expected.average(), rtol=1e-12)
        np.testing.assert_allclose(error, expected.standard_error(), rtol=1e-10)
        assert f"rank 0 of {team_size}" in report
        assert "collectives" in report


@pytest.mark.parametrize("given", ["sum", "linearized"])
def test_only_a_live_average_is_taken(given: str) -> None:
    H = HessianOperator(problems.model(), nn.CrossEntropyLoss(), [(X, Y)])
    other: Any = 2 * H if given == "sum" else H.linearize()
    with pytest.raises(TypeError, match=r"wrap that first, and linearize, damp"):
        DataParallel(other)
