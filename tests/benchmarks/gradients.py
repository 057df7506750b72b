"""Gradients of samples and their second moment, beside curvlinops, ``vmap(grad)`` and a loop.

``python tests/benchmarks/gradients.py [rounds] [mlp|cnn]`` prints seconds as ratios to a full gradient, of 1,000
samples, and to the best peer: all in one process, interleaved, on one thread. Who is off by more than rounding is told.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from peers import flat, gradient, imported
from timing import interleaved
from torch import Tensor
from torch.func import functional_call, grad, vmap
from workloads import Batch, Workload, cnn, mlp

from hvpop import EmpiricalFisherOperator, GradientOperator
from hvpop.curvature.formed import FORM_AFTER

Call = Callable[[], Tensor]

AIM = 0.5
"""Of the best peer."""

ROUNDING = 1e-4
"""What float32 may be off by."""

CHUNK = 64
"""Samples whose gradients are held at once, where somebody forms them."""


def of_samples(workload: Workload, n: int) -> Workload:
    """The workload with n samples, in batches of the size that it had."""
    x, y = (torch.cat(parts) for parts in zip(*workload.data, strict=True))
    times, size = -(-n // len(x)), len(next(iter(workload.data))[0])
    generator = torch.Generator().manual_seed(3)
    x = torch.cat([x + 0.1 * torch.randn(x.shape, generator=generator) for _ in range(times)])[:n]
    data: list[Batch] = list(zip(x.split(size), y.repeat(times)[:n].split(size), strict=True))
    return replace(workload, data=data)


class ByVmap:
    """Gradients of samples by ``vmap(grad)``, some at once."""

    def __init__(self, workload: Workload) -> None:
        model = workload.fresh()
        self.data = workload.data
        self.params = {name: p.detach() for name, p in model.named_parameters()}

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            value: Tensor = workload.loss(functional_call(model, params, (x[None],)), y[None])
            return value

        self._rows = vmap(grad(loss), in_dims=(None, 0, 0))

    def _blocks(self):
        for x, y in self.data:
            for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                found = self._rows(self.params, a, b)
                yield torch.cat([g.reshape(len(a), -1) for g in found.values()], 1)

    def push(self, v: Tensor) -> Tensor:
        return torch.cat([G @ v for G in self._blocks()])

    def pull(self, u: Tensor) -> Tensor:
        parts = iter(u.split([len(G) for x, _ in self.data for G in x.split(CHUNK)]))
        return sum(G.T @ next(parts) for G in self._blocks())

    def moment(self, v: Tensor) -> Tensor:
        count = sum(len(x) for x, _ in self.data)
        return sum(G.T @ (G @ v) for G in self._blocks()) / count


class ByLoop(ByVmap):
    """The same, by a backward pass for each sample."""

    def __init__(self, workload: Workload) -> None:
        self.data, self._model, self._loss = workload.data, workload.fresh(), workload.loss

    def _blocks(self):
        parameters = list(self._model.parameters())
        for x, y in self.data:
            for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                rows = [
                    flat(torch.autograd.grad(self._loss(self._model(xi), yi), parameters))
                    for xi, yi in zip(a.split(1), b.split(1), strict=True)
                ]
                yield torch.stack(rows)


def moments(workload: Workload, v: Tensor) -> dict[str, Call]:
    model = workload.fresh()
    E = EmpiricalFisherOperator(model, workload.loss, workload.data)
    kept, by_vmap, by_loop = E.linearize(), ByVmap(workload), ByLoop(workload)
    for _ in range(FORM_AFTER + 1):
        kept @ v  # what follows is what many products cost
    calls = {
        "hvpop": lambda: E @ v,
        "hvpop, linearized": lambda: kept @ v,
        "vmap(grad)": lambda: by_vmap.moment(v),
        "a loop": lambda: by_loop.moment(v),
    }
    try:
        theirs = imported("curvlinops").EFLinearOperator(
            model, workload.loss, list(model.parameters()), workload.data, check_deterministic=False
        )
    except ImportError:
        return calls
    return {**calls, "curvlinops": lambda: theirs @ v}


def rows(workload: Workload, v: Tensor, u: Tensor) -> dict[str, dict[str, Call]]:
    G = GradientOperator(workload.fresh(), workload.loss, workload.data)
    kept, by_vmap, by_loop = G.linearize(), ByVmap(workload), ByLoop(workload)
    return {
        "G v": {
            "hvpop": lambda: G @ v,
            "hvpop, linearized": lambda: kept @ v,
            "vmap(grad)": lambda: by_vmap.push(v),
            "a loop": lambda: by_loop.push(v),
        },
        "G' u": {
            "hvpop": lambda: G.T @ u,
            "hvpop, linearized": lambda: kept.T @ u,
            "vmap(grad)": lambda: by_vmap.pull(u),
            "a loop": lambda: by_loop.pull(u),
        },
    }


def report(title: str, workload: Workload, calls: dict[str, Call], rounds: int) -> None:
    truth = calls["a loop"]()
    full = gradient(workload)
    samples = interleaved({**calls, "a gradient": full}, repeats=rounds, clock=time.process_time)
    unit = samples["a gradient"]
    print(f"{title}: a gradient takes {1e3 * unit.median:.1f} ms")
    errors = {name: float((call() - truth).norm() / truth.norm()) for name, call in calls.items()}
    ratios = {name: samples[name].in_units_of(unit) for name in calls}
    right = [name for name, off in errors.items() if off < ROUNDING]
    best = min((n for n in right if not n.startswith("hvpop")), key=lambda n: ratios[n])
    for name, off in errors.items():
        said = "" if name in right else f"  WRONG by {off:.0e}"
        if name.startswith("hvpop"):
            of_best = samples[name].in_units_of(samples[best])
            said += f"  {of_best:5.2f} of {best}, {'ok' if of_best <= AIM else 'NOT'} at most {AIM}"
        print(f"  {name:20} {ratios[name]:8.2f}{said}", flush=True)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(make: Callable[[], Workload]) -> None:
    """What products of a thousand and of four thousand samples add to the process."""
    for n in (1000, 4000):
        workload = of_samples(make(), n)
        v = workload.vectors()
        E = EmpiricalFisherOperator(workload.fresh(), workload.loss, workload.data)
        G = GradientOperator(workload.fresh(), workload.loss, workload.data)
        before = peak()
        E @ v
        G.T @ (G @ v)
        print(f"  {n} samples: the peak grows by {peak() - before:.0f} MiB")


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chosen = {"mlp": [mlp], "cnn": [cnn]}.get(sys.argv[2] if len(sys.argv) > 2 else "", [mlp, cnn])
    for make in chosen:
        memory(make)
        workload = of_samples(make(), 1000)
        v = workload.vectors()
        u = torch.randn(1000, generator=torch.Generator().manual_seed(2))
        report(f"{workload.name}, empirical Fisher", workload, moments(workload, v), rounds)
        for title, calls in rows(workload, v, u).items():
            report(f"{workload.name}, {title}", workload, calls, rounds)


if __name__ == "__main__":
    main()
