"""Products at millions of parameters: the first, the later ones and what is kept, beside by hand.

``python tests/benchmarks/large_products.py [model ...]`` prints ratios. Times are of the processor, on one
thread, ours and theirs in turns in one process; what is kept is measured in a process of its own for each.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from large_models import LARGE
from torch import Tensor
from workloads import Workload

from hvpop import HessianOperator

ROUNDS = 5

Multiply = Callable[[Tensor], Tensor]


def by_hand(workload: Workload) -> Multiply:
    """The graphs of all gradients, kept: `torch.autograd.grad` twice."""
    parameters = list(workload.model.parameters())
    graphs = []
    for x, y in workload.data:
        loss = workload.loss(workload.model(x), y)
        graphs.append((len(x), torch.autograd.grad(loss, parameters, create_graph=True)))
    samples = sum(n for n, _ in graphs)

    def product(v: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in parameters])
        like = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        total = torch.zeros_like(v)
        for n, gradient in graphs:
            found = torch.autograd.grad(gradient, parameters, like, retain_graph=True)
            total.add_(torch.cat([f.reshape(-1) for f in found]), alpha=n / samples)
        return total

    return product


def ours(workload: Workload) -> Multiply:
    H = HessianOperator(workload.model, workload.loss, workload.data)
    return H.linearize(memory="16GiB").matvec


def gradient(workload: Workload) -> Callable[[], None]:
    parameters = list(workload.model.parameters())

    def run() -> None:
        for x, y in workload.data:
            torch.autograd.grad(workload.loss(workload.model(x), y), parameters)

    return run


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


WAYS = {"hvpop": ours, "by hand": by_hand}


def timed(workload: Workload) -> dict[str, float]:
    """Medians over rounds: first product and later ones over by hand's, later ones in gradients."""
    v = torch.randn(workload.parameters, generator=torch.Generator().manual_seed(1))
    apart = (ours(workload)(v) - (truth := by_hand(workload)(v))).norm() / truth.norm()
    assert apart < 1e-4, apart
    first: dict[str, list[float]] = {name: [] for name in WAYS}
    later: dict[str, list[float]] = {name: [] for name in WAYS}
    unit = []
    for r in range(ROUNDS):
        for name, way in list(WAYS.items())[:: 1 if r % 2 else -1]:
            made: list[Multiply] = []

            def build(
                way: Callable[[Workload], Multiply] = way, made: list[Multiply] = made
            ) -> None:
                made.append(way(workload))
                made[0](v)

            first[name].append(seconds(build))
            later[name].append(min(seconds(lambda m=made[0]: m(v)) for _ in range(2)))
            made.clear()
        unit.append(seconds(gradient(workload)))
    median = statistics.median
    return {
        "first product over by hand's": _ratio(first),
        "later products over by hand's": _ratio(later),
        "a later product, in gradients": median(later["hvpop"]) / median(unit),
        "by hand, in gradients": median(later["by hand"]) / median(unit),
    }


def _ratio(times: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(times["hvpop"], times["by hand"], strict=True))


def kept(name: str, way: str) -> dict[str, float]:
    """What stays in a process after the first products, in units of the parameters' bytes."""
    command = [sys.executable, __file__, "--kept", name, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, way: str) -> dict[str, float]:
    torch.set_num_threads(1)
    workload = LARGE[name]()
    v = torch.randn(workload.parameters)
    WAYS[way](workload)(v)  # what torch loads at first use
    before = resident()
    product = WAYS[way](workload)
    product(v)
    product(v)
    n = 4 * workload.parameters
    found = {"process": (resident() - before) / n}
    operator = getattr(product, "__self__", None)
    if operator is not None:
        found["report"] = operator.report().bytes / n
    return found


def resident() -> int:
    """Bytes of this process in memory, once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or list(LARGE):
        workload = LARGE[name]()
        print(f"{workload.title}: {workload.parameters / 1e6:.1f} M parameters")
        rows = timed(workload)
        del workload
        mine, theirs = kept(name, "hvpop"), kept(name, "by hand")
        rows["kept, n"], rows["kept by hand, n"] = mine["process"], theirs["process"]
        rows["kept over by hand's"] = mine["process"] / theirs["process"]
        rows["kept over what report() says"] = mine["process"] / mine["report"]
        for what, number in rows.items():
            print(f"  {what:32} {number:6.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kept"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
