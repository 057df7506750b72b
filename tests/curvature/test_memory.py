"""How much memory products really take, measured as the peak of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc"
)

MEASURE = """
import json, torch
from torch import nn
from hvpop import EmpiricalFisherOperator, GradientOperator, HessianOperator
torch.set_num_threads(1)

class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((12, 1), 0.9))
    def forward(self, x):
        for w in self.w:
            x = torch.tanh(x * w)
        return x

class Made:  # batches that exist only while they are used
    def __init__(self, n):
        self.n = n
    def __iter__(self):
        for i in range(self.n):
            x = torch.full((SIZE, 1), 0.1 * (i + 1))
            yield x, x

def peak():
    with open("/proc/self/status") as lines:  # getrusage would count what the parent held
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024

SIZE, model, loss = 10, Chain(), nn.MSELoss()
v = torch.ones(12)
HessianOperator(model, loss, Made(2)).linearize(memory=0) @ v  # what torch loads at first use
SIZE, peaks = 400_000, {"before": peak()}
live = lambda n, **kw: HessianOperator(model, loss, Made(n), **kw)
live(1) @ v
peaks["one batch"] = peak()
live(6) @ v
peaks["six batches"] = peak()
live(6).linearize(memory=0) @ v
peaks["linearized, nothing kept"] = peak()
A = live(6).linearize(memory=int(2.5 * (peaks["one batch"] - peaks["before"])))
A @ v
A @ v
peaks["linearized"], peaks["kept"], peaks["bytes"] = peak(), A.report().kept, A.report().bytes
del A
live(6, mode="full") @ v
peaks["full"] = peak()
print(json.dumps(peaks))
"""


SECOND_MOMENT = (
    MEASURE[: MEASURE.index("HessianOperator(model, loss, Made(2))")]
    + """
def products(n):
    E, G = (kind(model, loss, Made(n)) for kind in (EmpiricalFisherOperator, GradientOperator))
    E @ v
    E.linearize(memory=0) @ v
    G @ v
    G.T @ torch.ones(G.shape[0])
products(1)
SIZE, peaks = 400_000, {"before": peak()}
products(1)
peaks["one batch"] = peak()
products(6)
peaks["six batches"] = peak()
print(json.dumps(peaks))
"""
)


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    return measured(MEASURE)


def measured(script: str) -> dict[str, int]:
    # Large tensors go back to the system as soon as they are freed, so that the peak is theirs.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=environment,
    )
    return dict(json.loads(done.stdout))


def test_the_memory_of_a_live_product_is_that_of_one_batch(peaks: dict[str, int]) -> None:
    one = peaks["one batch"] - peaks["before"]
    assert one > 50e6  # large enough to be seen
    assert peaks["six batches"] - peaks["one batch"] < 0.5 * one


def test_gradients_and_their_second_moment_take_that_of_one_batch_too() -> None:
    found = measured(SECOND_MOMENT)
    one = found["one batch"] - found["before"]
    assert one > 50e6
    assert found["six batches"] - found["one batch"] < 0.5 * one


def test_a_linearized_product_without_budget_takes_no_more(peaks: dict[str, int]) -> None:
    one = peaks["one batch"] - peaks["before"]
    assert peaks["linearized, nothing kept"] - peaks["one batch"] < 0.5 * one


def test_a_linearized_product_stays_within_its_budget_and_one_batch(peaks: dict[str, int]) -> None:
    one = peaks["one batch"] - peaks["before"]
    assert 0 < peaks["kept"] < 6
    assert peaks["bytes"] <= 2.5 * one
    assert peaks["linearized"] - peaks["before"] < (2.5 + 1.25) * one


def test_full_mode_takes_the_memory_of_all_batches(peaks: dict[str, int]) -> None:
    """Which shows that the measurement would notice."""
    one = peaks["one batch"] - peaks["before"]
    assert peaks["full"] - peaks["before"] > 3.5 * one
