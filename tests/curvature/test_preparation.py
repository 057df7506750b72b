"""What a linearized operator keeps and how it runs its batches never changes a number."""

from __future__ import annotations

import dataclasses
import random as python_random
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import BATCHES, SAMPLES, Average, EmpiricalRisk, HessianOperator, ReverseOverReverse
from hvpop.strategies import LinearMap

from .problems import error, mlp, random, regression, set_parameters, split

TIGHT = 1e-12
DATA = split(regression(), (10, 10, 3))
ADVICE = "batches are run one by one"
POINT = 8 * sum(p.numel() for p in mlp().parameters())
"""Bytes that are kept whatever the budget is."""


def hessian(model: nn.Module, data: Any = DATA, **settings: Any) -> HessianOperator:
    return HessianOperator(model, nn.MSELoss(), data, **settings)


# -- budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("memory", [0, 1, 1000, 5000, 20_000, "2 KiB", "0.5MB", "2GiB", None])
def test_every_budget_gives_the_same_numbers(memory: Any, in_memory: bool) -> None:
    data: Any = split(regression(100), (30, 30, 30, 10))
    expected = hessian(mlp(), data).to_dense()
    if not in_memory:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*regression(100)), 30)
    A = hessian(mlp(), data).linearize(memory=memory)
    assert error(A.to_dense(), expected) < TIGHT
    assert error(A @ expected[0], expected @ expected[0]) < TIGHT
    report = A.report()
    assert report.bytes <= max(report.budget, POINT)


@pytest.mark.parametrize("memory", ["much", "", "GiB", "2 XiB", "-1GB", "1e3"])
def test_a_budget_that_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(ValueError, match=f"bytes or text such as '2GiB', got '{memory}'"):
        hessian(mlp()).linearize(memory=memory)


@pytest.mark.parametrize("memory", [[1], float("nan"), True])
def test_a_budget_that_is_no_number_is_refused(memory: Any) -> None:
    with pytest.raises(TypeError, match="memory must be bytes or text such as '2GiB', got"):
        hessian(mlp()).linearize(memory=memory)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="memory must not be negative, got -1"):
        hessian(mlp()).linearize(memory=-1)


def test_the_report_tells_what_is_kept_and_what_it_cost() -> None:
    A = hessian(mlp()).linearize(memory="1GiB")
    A @ random(A.shape[1], 3)
    A @ random(A.shape[1])
    report = A.report()
    assert (report.batches, report.kept, report.passes, report.products) == (3, 3, 1, 4)
    assert report.parts == 1  # small batches run as one
    assert 0 < report.bytes < report.budget == 2**30
    assert report.strategy == "ReverseOverReverse()"
    assert report.seconds > 0
    assert "3 batches run as 1, maps of 3 kept" in str(report)
    assert dataclasses.is_dataclass(report)
    nothing = hessian(mlp()).linearize(memory=0).report()
    assert (nothing.kept, nothing.bytes, nothing.products) == (0, POINT, 0)


def test_the_report_counts_batches_that_are_not_held_too() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*regression(23)), 5)
    A = hessian(mlp(), loader).linearize(memory=0)
    A @ random(A.shape[1])
    assert (A.report().batches, A.report().parts, A.report().kept) == (5, 5, 0)


# -- memory that runs out ----------------------------------------------------------------------------


class Cramped(ReverseOverReverse):
    """As if memory had room for a few graphs at a time."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.alive: weakref.WeakSet[LinearMap] = weakref.WeakSet()

    def linearize(self, *args: Any, **settings: Any) -> LinearMap:
        if len(self.alive) >= self.room:
            raise torch.OutOfMemoryError("out of memory")
        linear = super().linearize(*args, **settings)
        self.alive.add(linear)
        return linear


@pytest.mark.parametrize("room", [2, 4])
def test_less_is_kept_when_memory_runs_out(room: int) -> None:
    data = split(regression(21), (1, 2, 3, 4, 5, 6))
    expected = hessian(mlp(), data).to_dense()
    A = hessian(mlp(), data, strategy=Cramped(room), average=BATCHES).linearize(memory="1GiB")
    reference = hessian(mlp(), data, average=BATCHES).to_dense()
    assert error(A.to_dense(), reference) < TIGHT
    assert error(A @ reference[0], reference @ reference[0]) < TIGHT
    assert error(hessian(mlp(), data, strategy=Cramped(1)).to_dense(), expected) < TIGHT


# -- batches run as one ------------------------------------------------------------------------------


def contrast(out: Tensor, y: Tensor) -> Tensor:
    """A loss in which every sample of a batch sees the others."""
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


class Steps(nn.Module):
    """A recurrent network over inputs (time, batch, 4): samples run along the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 3)
        set_parameters(self.double())

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def normalized() -> nn.Module:
    """A network in training mode whose samples see each other by their statistics."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return set_parameters(model.double())


def sequences(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    return [(random(t, 5, 4, seed=i), random(t, 5, 3, seed=9 - i)) for i, t in enumerate(lengths)]


EVEN, RAGGED = split(regression(24), (8, 8, 8)), split(regression(23), (10, 4, 9))
COUPLED: dict[str, tuple[Any, Any, Any]] = {
    "contrastive": (mlp, contrast, EVEN),
    "contrastive, ragged": (mlp, contrast, RAGGED),
    "batch norm": (normalized, nn.MSELoss(), EVEN),
    "batch norm, ragged": (normalized, nn.MSELoss(), RAGGED),
    "time first": (Steps, nn.MSELoss(), sequences(4, 4, 4)),
    "time first, ragged": (Steps, nn.MSELoss(), sequences(4, 2, 6)),
    "standardized": (
        mlp,
        lambda out, y: ((out - out.mean(0)) / out.std(0) - y).square().mean(),
        EVEN,
    ),
    "root mean square": (mlp, lambda out, y: (out - y).square().mean().sqrt(), RAGGED),
    "penalty": (mlp, lambda out, y: (out - y).square().mean() + out.square().mean() ** 2, RAGGED),
}


@pytest.mark.filterwarnings(f"ignore:.*{ADVICE}|batches are weighted by")
@pytest.mark.parametrize("average", [SAMPLES, BATCHES], ids=repr)
@pytest.mark.parametrize("name", COUPLED)
def test_batches_whose_samples_see_each_other_stay_apart(name: str, average: Average) -> None:
    make, loss, data = COUPLED[name]
    H = HessianOperator(make(), loss, data, average=average)
    V = random(H.shape[1], 3)
    assert error(H.linearize() @ V, H @ V) < TIGHT


def test_independent_samples_run_as_one_function() -> None:
    for data in (EVEN, RAGGED):
        for average in (None, BATCHES):
            settings = {} if average is None else {"average": average}
            A = hessian(mlp(), data, **settings).linearize()
            parts = A.report().parts
            # Under BATCHES the batches of unequal size keep weights of their own.
            assert parts == (3 if data is RAGGED and average is BATCHES else 1)


# -- randomness in the model ---------------------------------------------------------------------------


def dropping() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
    return set_parameters(model.double())


@pytest.mark.parametrize("linearized", [True, False])
def test_dropout_is_one_symmetric_matrix(linearized: bool) -> None:
    H: Any = hessian(dropping())
    A = H.linearize() if linearized else H
    dense = A.to_dense()
    assert torch.equal(A.to_dense(), dense)
    assert error(dense.T, dense) < TIGHT
    assert error(dense, H.to_dense()) < TIGHT
    assert torch.equal(hessian(dropping()).to_dense(), H.to_dense())


def test_each_batch_and_each_seed_has_masks_of_its_own() -> None:
    batch = DATA[0]
    one = hessian(dropping(), [batch]).to_dense()
    assert error(hessian(dropping(), [batch, batch]).to_dense(), one) > 1e-3
    assert error(hessian(dropping(), [batch, batch]).linearize().to_dense(), one) > 1e-3
    assert error(hessian(dropping(), [batch], seed=1).to_dense(), one) > 1e-3
    assert error(hessian(dropping().eval(), [batch, batch]).to_dense(), one) > 1e-3


class Skipping(nn.Module):
    """A network with stochastic depth, drawn by something else than torch's global numbers."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.net, self.head = set_parameters(nn.Linear(4, 4).double()), mlp()
        self.source = source
        self.own = {
            "torch generator": torch.Generator().manual_seed(3),
            "numpy generator": np.random.default_rng(3),
        }.get(source)

    def forward(self, x: Tensor) -> Tensor:
        if self.source == "python":
            scale: Any = python_random.random()
        elif self.source == "numpy":
            scale = np.random.rand()
        elif self.source == "torch generator":
            scale = torch.rand((), generator=self.own, dtype=torch.float64)
        else:
            scale = self.own.random()
        return self.head(x + scale * torch.tanh(self.net(x)))


@pytest.mark.filterwarnings(f"error:.*{ADVICE}")
@pytest.mark.parametrize("source", ["python", "numpy", "torch generator", "numpy generator"])
def test_models_that_draw_from_elsewhere_are_one_matrix_too(source: str) -> None:
    model = Skipping(source)
    before = repr(model.own.bit_generator.state) if source == "numpy generator" else None
    H = hessian(model)
    v = random(H.shape[1])
    first = H @ v
    assert torch.equal(H @ v, first)
    assert error(H.linearize() @ v, first) < TIGHT
    assert error(H.linearize(memory=0) @ v, first) < TIGHT
    if before is not None:
        assert repr(model.own.bit_generator.state) == before


def test_a_risk_says_whether_it_is_random() -> None:
    for model, expected in ((mlp(), False), (dropping(), True), (Skipping("numpy"), True)):
        risk = EmpiricalRisk(model, nn.MSELoss(), DATA)
        assert risk.is_random(next(risk.terms())) is expected


class Watched(ReverseOverReverse):
    """Notes how many columns go together, and has no memory for more than ``most``."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        self.most = most
        self.together: list[int] = []

    def linearize(self, *args: Any, **kwargs: Any) -> LinearMap:
        return _Watched(self, super().linearize(*args, **kwargs))


class _Watched(LinearMap):
    def __init__(self, strategy: Watched, linear: LinearMap) -> None:
        self.strategy, self.linear = strategy, linear

    def __call__(self, v: Any) -> Any:
        return self.linear(v)

    def columns(self, V: Any) -> Any:
        self.strategy.together.append(next(iter(V.values())).shape[0])
        if self.strategy.together[-1] > self.strategy.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.linear.columns(V)


@pytest.mark.parametrize(("graphs", "width"), [(0, 1), (1, 1), (2, 1), (6, 4), (100, 12)])
def test_as_many_columns_go_together_as_fit_the_budget(
    monkeypatch: pytest.MonkeyPatch, graphs: int, width: int
) -> None:
    monkeypatch.setattr("hvpop.curvature.preparation.LIVE_BYTES", 0)
    strategy = Watched()
    H = hessian(mlp(), [regression(1000)], strategy=strategy)
    A = H.linearize(memory=graphs * H.linearize().report().bytes)
    V = random(A.shape[0], 12)
    expected = H.to_dense() @ V
    strategy.together.clear()
    assert error(A @ V, expected) < TIGHT
    assert max(strategy.together) == width


def test_where_memory_runs_out_fewer_columns_go_together() -> None:
    strategy = Watched(most=3)
    A = hessian(mlp(), [regression(20)], strategy=strategy).linearize(memory=0)
    V = random(A.shape[0], 12)
    expected = hessian(mlp(), [regression(20)]).linearize() @ V
    assert error(A @ V, expected) < TIGHT
    assert strategy.together == [12, 6, 3, 3, 3, 3]
    with pytest.raises(torch.OutOfMemoryError):
        hessian(mlp(), [regression(20)], strategy=Watched(most=0)).linearize(memory=0) @ V


class Rounded(nn.Module):
    """Computes in bfloat16, or has an op that vmap gets wrong by a thousandth."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.body, self.autocast = mlp(), autocast

    def forward(self, x: Tensor) -> Tensor:
        if self.autocast:
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x).float()
        return Thousandth.apply(self.body(x))


class Thousandth(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 1.0 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return 1.001 * x, in_dims[0]


@pytest.mark.parametrize("autocast", [True, False])
def test_a_small_disagreement_is_told_unless_rounding_explains_it(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    data = [(x.to(dtype), y.to(dtype)) for x, y in split(regression(20), (10, 10))]
    model = Rounded(autocast).to(dtype)

    def loss(out: Tensor, y: Tensor) -> Tensor:  # of the batch as a whole: only vmap may join
        return (out - y).square().mean() + out.mean().square()

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        A = HessianOperator(model, loss, data, average=BATCHES).linearize()
        v = random(A.shape[0]).to(dtype)
        product = A @ v
    assert any(ADVICE in str(warning.message) for warning in found) is not autocast
    expected = HessianOperator(model, loss, data, average=BATCHES) @ v
    assert error(product, expected) < (2e-2 if autocast else TIGHT)
