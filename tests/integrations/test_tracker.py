"""A tracker tells the curvature of the moment, and training does not notice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvpop import Dense, Diagonal, HessianOperator
from hvpop.integrations import Tracker


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3)
    ).double()
    x, y = torch.randn(60, 4).double(), torch.randint(3, (60,))
    return model, list(zip(x.split(20), y.split(20), strict=True))


def trained(
    watched: bool, wrap: Callable[[nn.Module], nn.Module] = nn.Sequential
) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    with torch.random.fork_rng():
        model, data = problem()
        model = wrap(model)
        loss = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        tracker = Tracker(HessianOperator(model, loss, data), density_every=2, k=2)
        for step in range(6):
            for x, y in data:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                if watched and step == 3:
                    tracker()  # between backward and step, where gradients are waiting
                optimizer.step()
            if watched:
                tracker(step)
        steps = [step for step, _ in tracker.history]
        return {k: v.clone() for k, v in model.state_dict().items()}, torch.rand(3), steps


def test_training_is_the_same_to_the_last_bit() -> None:
    (plain, drawn, _), (watched, drawn_too, steps) = trained(False), trained(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(drawn, drawn_too)
    assert len(steps) == 6 + 3


def test_training_data_parallel_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        (plain, *_), (watched, *_) = (
            trained(each, nn.parallel.DistributedDataParallel) for each in (False, True)
        )
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_it_tells_the_largest_eigenvalues_and_the_trace_of_the_moment() -> None:
    with torch.random.fork_rng():
        model, data = problem()
    model.eval()
    H = HessianOperator(model, nn.CrossEntropyLoss(), data)
    tracker = Tracker(H, k=2, density_every=2, rtol=1e-6)
    for step in range(3):
        found, eigenvalues = tracker(step), torch.linalg.eigvalsh(H.to_dense())
        size = eigenvalues.abs().max().item()
        for i in (1, 2):  # an eigenvalue is within its residual, 1e-6 of the norm
            assert abs(found[f"curvature/eigenvalue_{i}"] - eigenvalues[-i]) <= 1e-6 * size
        error = 5 * found["curvature/trace_error"] + 1e-12
        assert abs(found["curvature/trace"] - eigenvalues.sum()) <= error
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
    assert [step for step, _ in tracker.densities] == [0, 2]
    assert [step for step, _ in tracker.history] == [0, 1, 2]


def test_a_warm_start_takes_fewer_products() -> None:
    with torch.random.fork_rng():
        model, data = problem()
    H = HessianOperator(model.eval(), nn.CrossEntropyLoss(), data)
    tracker = Tracker(H, trace=False)
    cold, warm = tracker(), tracker()
    assert warm["curvature/products"] <= cold["curvature/products"]


def test_what_cannot_be_tracked_is_refused() -> None:
    with pytest.raises(ValueError, match="Tracker expects a symmetric operator"):
        Tracker(Dense(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="Tracker expects k >= 1"):
        Tracker(Dense(torch.ones(2, 2), symmetric=True), k=0)


class Stopped(Diagonal):
    """Ctrl-C at a product."""

    at, count = 0, 0

    def _apply(self, V: Tensor) -> Tensor:
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(signal.SIGINT)
        return super()._apply(V)


@pytest.mark.parametrize("at", [2, 12, 32])
def test_ctrl_c_in_a_measurement_ends_the_training(at: int) -> None:
    """What it had found by then would pass for a measurement, and the training go on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    H = Stopped(torch.linspace(1, 100, 300, dtype=torch.float64))
    H.at = at
    tracker = Tracker(H, density_every=1)
    with pytest.raises(KeyboardInterrupt):
        tracker()
    assert tracker.history == []
