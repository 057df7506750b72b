"""What stands around the products at millions of entries, beside SciPy's solvers and plain loops.

A part of `run.py`: both in one process, in turns, the price of the products themselves taken off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import scipy.sparse.linalg
import torch
from contests import Plan, Row, product_among
from large_models import LARGE
from ours import KEPT
from peers import PEERS
from timing import Clock, Samples
from torch import Tensor

from hvpop import Damped, Diagonal, FromFunction, LinearOperator
from hvpop.solvers import cg
from hvpop.spectrum import eigsh, spectral_density, trace

NAME = "large"
SIZES = (2_000_000, 11_000_000)
ROUNDS = 5


class Counted:
    """A cheap operator for both sides, with the seconds that its products take."""

    def __init__(self, n: int, clock: Clock) -> None:
        self.d = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.1
        self.d[n // 2], self.d[n // 3] = 1.1001, 1.1002
        self.clock = clock
        self.products, self.seconds = 0, 0.0
        self.ours = FromFunction(self._times, (n, n), dtype=torch.float32, symmetric=True)
        self.scipy = scipy.sparse.linalg.LinearOperator(
            (n, n), matvec=lambda x: self._times(torch.from_numpy(x)[:, None])[:, 0].numpy(),
            dtype=np.float32,
        )  # fmt: skip

    def _times(self, V: Tensor) -> Tensor:
        start = self.clock()
        Y = self.d[:, None] * V
        self.seconds += self.clock() - start
        self.products += V.shape[1]
        return Y

    def beside(self, call: Callable[[], object]) -> float:
        """Seconds a product that a call spends outside of the products."""
        self.products, self.seconds = 0, 0.0
        start = self.clock()
        call()
        return (self.clock() - start - self.seconds) / self.products


def solving(
    n: int, clock: Clock
) -> dict[str, tuple[str, Callable[[], float], Callable[[], float]]]:
    """Who the peer is, ours and theirs, each a call that gives seconds a product."""
    A = Counted(n, clock)
    b = torch.randn(n, generator=torch.Generator().manual_seed(1))

    def arpack() -> None:
        with contextlib.suppress(scipy.sparse.linalg.ArpackNoConvergence):
            scipy.sparse.linalg.eigsh(A.scipy, k=2, maxiter=5, tol=1e-9)

    def hutchinson() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(32):
            z = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
            torch.dot(z, A._times(z[:, None])[:, 0])

    def quadrature() -> None:
        generator = torch.Generator().manual_seed(0)
        v, last, beta = torch.randn(n, generator=generator), torch.zeros(n), 0.0
        v /= v.norm()
        for _ in range(16):
            w = A._times(v[:, None])[:, 0] - beta * last
            w = w - torch.dot(w, v) * v
            beta = float(w.norm())
            last, v = v, w / beta

    b_array = b.numpy()
    return {
        "eigsh(k=2)": (
            "SciPy",
            lambda: A.beside(lambda: eigsh(A.ours, 2, rtol=1e-9, max_products=60)),
            lambda: A.beside(arpack),
        ),
        "cg": (
            "SciPy",
            lambda: A.beside(lambda: cg(A.ours, b, rtol=1e-30, max_steps=20)),
            lambda: A.beside(
                lambda: scipy.sparse.linalg.cg(A.scipy, b_array, rtol=1e-30, maxiter=20)
            ),
        ),
        "trace": (
            "plain loop",
            lambda: A.beside(lambda: trace(A.ours, rtol=None, max_products=32)),
            lambda: A.beside(hutchinson),
        ),
        "density": (
            "plain loop",
            lambda: A.beside(lambda: spectral_density(A.ours, steps=16, max_products=16, block=1)),
            lambda: A.beside(quadrature),
        ),
    }


def block(n: int, clock: Clock) -> tuple[str, Callable[[], float], Callable[[], float]]:
    """One product of 8 columns and 8 single ones, around a damped diagonal."""
    A: LinearOperator = Damped(Diagonal(torch.rand(n)), 0.1)
    V = A.space.random(lambda v: v.normal_(), 8)

    def timed(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    return (
        "single ones",
        lambda: timed(lambda: A @ V),
        lambda: timed(lambda: [A @ V[:, i] for i in range(8)]),
    )


def products(plan: Plan) -> Iterator[list[Row]]:
    """A product of each model, after `linearize()`, beside those of the peers, in few rounds."""
    few = replace(plan, repeats=min(ROUNDS, plan.repeats))
    slower = ("pyDVL, reverse", "pyDVL, forward", "by hand")  # than what keeps the graphs
    entrants = [KEPT[0], *(e for e in PEERS if e.name not in slower)]
    for name, make in LARGE.items():
        yield product_among(entrants, replace(make(), name=NAME), few, f"a product, {name}")


def measured(plan: Plan) -> Iterator[list[Row]]:
    """The rows of each question: at each size, then for each model."""
    for n in SIZES:
        asked = {f"{name} beside products": who for name, who in solving(n, plan.clock).items()}
        for name, (peer, ours, theirs) in {**asked, "a block of 8": block(n, plan.clock)}.items():
            samples: tuple[list[float], list[float]] = ([], [])
            for r in range(min(ROUNDS, plan.repeats)):
                for i in (0, 1) if r % 2 else (1, 0):
                    samples[i].append((ours, theirs)[i]())
            yield [
                Row(NAME, question(name, n), who, who == "hvpop", False, "right", 0.0,
                    seconds=Samples(tuple(seconds)))
                for who, seconds in zip(("hvpop", peer), samples, strict=True)
            ]  # fmt: skip
    yield from products(plan)


def question(name: str, n: int) -> str:
    return f"{name}, {n // 1_000_000} M entries"


AIMS = {
    question(f"{name} beside products", n): 1.0
    for n in SIZES
    for name in ("eigsh(k=2)", "cg", "trace", "density")
}
AIMS |= {f"a product, {name}": 1.0 for name in LARGE}
AIMS |= {question("a block of 8", n): 1.1 for n in SIZES}
