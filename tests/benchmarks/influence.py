"""Influence of 1,437 training digits on 100 test digits: hvpop through Gauss-Newton, pyDVL's `CgInfluence`.

``python tests/benchmarks/influence.py [rounds] [damping]`` prints seconds from model and data to the matrix of
influences ``(100, 1437)``, as ratios to pyDVL's, in one process, in rounds, on one thread. Each is held against
the same formula in float64 with its own matrix written out: pyDVL has the Hessian, which the damping must make
positive definite, or the second moment of gradients. pyDVL solves one by one if not told otherwise, which takes
hours, as its tolerance, squared, is below what float32 reaches: two systems are timed, of as many steps as suffice.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peers import NotInstalledError, flat, imported
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import digits

from hvpop import Damped, GaussNewtonOperator, GradientOperator, HessianOperator
from hvpop.solvers import Inverse, block_cg, cg

TRAIN, TEST = 1437, 100
BATCH = 479  # a third: pyDVL lets all batches count alike


def ours(kind: Callable[..., object], solve: Callable[..., object], task: Task) -> Tensor:
    """Everything from the model on; to the accuracy that pyDVL's tolerance comes to."""
    batches = list(zip(task.x.split(BATCH), task.y.split(BATCH), strict=True))
    A = Damped(kind(task.model, task.loss, batches), task.damping).linearize()
    inverse = Inverse(A, solve=partial(solve, rtol=0.05 * task.rtol))
    G_train = GradientOperator(task.model, task.loss, batches)
    G_test = GradientOperator(task.model, task.loss, [task.test])
    return (G_train @ inverse @ G_test.T).to_dense().T


def pydvls(mode: str, task: Task) -> Tensor:
    """As its documentation says, all systems together."""
    influence = _pydvl(mode, task, solve_simultaneously=True)
    found: Tensor = influence.influences(*task.test, task.x, task.y)
    return found.detach()


def one_by_one(task: Task, systems: int = 2) -> float:
    """Seconds that pyDVL's default takes for a system, stopped after the steps that `cg` takes."""
    influence = _pydvl("hessian", task, maxiter=31, warn_on_max_iteration=False)
    start = time.process_time()
    influence.influence_factors(*(t[:systems] for t in task.test))
    return (time.process_time() - start) / systems


def _pydvl(mode: str, task: Task, **how: Any) -> Any:
    library = imported("pydvl.influence.torch")
    modes = imported("pydvl.influence.torch.util").SecondOrderMode
    influence = library.CgInfluence(
        task.model,
        task.loss,
        regularization=task.damping,
        rtol=task.rtol,
        atol=0.0,
        second_order_mode=modes(mode),
        **how,
    )
    influence.fit(DataLoader(TensorDataset(task.x, task.y), batch_size=BATCH))
    return influence


class Task:
    """A trained network, its data, and the answers in float64."""

    def __init__(self, damping: float, rtol: float = 1e-4) -> None:
        workload = digits()
        self.model, self.loss = workload.fresh(), nn.CrossEntropyLoss()
        x, y = workload.data.dataset.tensors  # type: ignore[attr-defined]
        self.x, self.y = x[:TRAIN], y[:TRAIN]
        self.test = x[TRAIN : TRAIN + TEST], y[TRAIN : TRAIN + TEST]
        self.damping, self.rtol = damping, rtol

    def truth(self, kind: Callable[..., object] | None) -> Tensor:
        """With a dense matrix; None: the second moment of gradients."""
        model = self.double()
        train, test = (self.gradients(model, *pair) for pair in ((self.x, self.y), self.test))
        if kind is None:
            M = train.T @ train / TRAIN
        else:
            M = kind(model, self.loss, [(self.x.double(), self.y)]).to_dense()  # type: ignore[attr-defined]
        M = M + self.damping * torch.eye(len(M), dtype=M.dtype)
        name = "moment" if kind is None else kind.__name__  # type: ignore[attr-defined]
        print(
            f"  {name}: damped, the smallest eigenvalue is {float(torch.linalg.eigvalsh(M)[0]):.1e}"
        )
        return test @ torch.linalg.solve(M, train.T)

    def double(self) -> nn.Module:

        return copy.deepcopy(self.model).double()

    def gradients(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        parameters = list(model.parameters())
        rows = [
            flat(torch.autograd.grad(self.loss(model(a), b), parameters))
            for a, b in zip(x.double().split(1), y.split(1), strict=True)
        ]
        return torch.stack(rows)


ENTRANTS: dict[str, tuple[Callable[[Task], Tensor], Callable[..., object] | None]] = {
    "pyDVL, Hessian, together": (partial(pydvls, "hessian"), HessianOperator),
    "pyDVL, moment, together": (partial(pydvls, "gauss_newton"), None),
    "hvpop, Gauss-Newton, block_cg": (
        partial(ours, GaussNewtonOperator, block_cg),
        GaussNewtonOperator,
    ),
    "hvpop, Gauss-Newton, cg": (partial(ours, GaussNewtonOperator, cg), GaussNewtonOperator),
    "hvpop, Hessian, block_cg": (partial(ours, HessianOperator, block_cg), HessianOperator),
}


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    task = Task(float(sys.argv[2]) if len(sys.argv) > 2 else 1e-2)
    truths = {kind: task.truth(kind) for kind in dict.fromkeys(k for _, k in ENTRANTS.values())}
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):  # calls are long, and build everything anew: nothing is warmed up
        for name, (answer, kind) in ENTRANTS.items():
            start = time.process_time()
            try:
                found = answer(task)
            except NotInstalledError:
                continue
            taken = time.process_time() - start
            off = float((found.double() - truths[kind]).norm() / truths[kind].norm())
            seconds.setdefault(name, []).append(taken)
            print(f"  {name:32} {taken:8.2f} s, off by {off:.1e} of its own matrix's", flush=True)
    first = statistics.median(next(iter(seconds.values())))
    for name, own in seconds.items():
        print(f"{name:34} {statistics.median(own):8.2f} s  {statistics.median(own) / first:6.3f}")
    try:
        alone = one_by_one(task)
    except NotInstalledError:
        return
    print(
        f"pyDVL, Hessian, one by one, its default: {alone:.2f} s a system, {TEST * alone:.0f} s for {TEST}"
    )


if __name__ == "__main__":
    main()
