"""What stands around the products at millions of entries, beside SciPy's solvers and plain loops.

``python tests/benchmarks/large.py [entries]`` prints the ratios: both in one process, interleaved, on one
thread, the price of the products themselves taken off.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpop import Damped, Diagonal, FromFunction, LinearOperator
from hvpop.solvers import cg
from hvpop.spectrum import eigsh, spectral_density, trace

ROUNDS = 5


class Counted:
    """A cheap operator for both sides, with the seconds that its products take."""

    def __init__(self, n: int) -> None:
        self.d = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.1
        self.d[n // 2], self.d[n // 3] = 1.1001, 1.1002
        self.products, self.seconds = 0, 0.0
        self.ours = FromFunction(self._times, (n, n), dtype=torch.float32, symmetric=True)
        self.scipy = scipy.sparse.linalg.LinearOperator(
            (n, n), matvec=lambda x: self._times(torch.from_numpy(x)[:, None])[:, 0].numpy(),
            dtype=np.float32,
        )  # fmt: skip

    def _times(self, V: Tensor) -> Tensor:
        start = time.process_time()
        Y = self.d[:, None] * V
        self.seconds += time.process_time() - start
        self.products += V.shape[1]
        return Y

    def beside(self, call: Callable[[], object]) -> float:
        """Milliseconds a product that a call spends outside of the products."""
        self.products, self.seconds = 0, 0.0
        start = time.process_time()
        call()
        return 1e3 * (time.process_time() - start - self.seconds) / self.products


def contests(n: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Ours and theirs, each a call that gives milliseconds a product."""
    A = Counted(n)
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
            lambda: A.beside(lambda: eigsh(A.ours, 2, rtol=1e-9, max_products=60)),
            lambda: A.beside(arpack),
        ),
        "cg": (
            lambda: A.beside(lambda: cg(A.ours, b, rtol=1e-30, max_steps=20)),
            lambda: A.beside(
                lambda: scipy.sparse.linalg.cg(A.scipy, b_array, rtol=1e-30, maxiter=20)
            ),
        ),
        "trace": (
            lambda: A.beside(lambda: trace(A.ours, rtol=None, max_products=32)),
            lambda: A.beside(hutchinson),
        ),
        "spectral_density": (
            lambda: A.beside(lambda: spectral_density(A.ours, steps=16, max_products=16, block=1)),
            lambda: A.beside(quadrature),
        ),
    }


def block_against_singles(n: int) -> float:
    """One product of 8 columns, in units of 8 single ones, around a damped diagonal."""
    A: LinearOperator = Damped(Diagonal(torch.rand(n)), 0.1)
    V = A.space.random(lambda v: v.normal_(), 8)
    ratios = []
    for _ in range(ROUNDS):
        start = time.process_time()
        A @ V
        middle = time.process_time()
        for i in range(8):
            A @ V[:, i]
        ratios.append((middle - start) / (time.process_time() - middle))
    return statistics.median(ratios)


def main(n: int) -> None:
    torch.set_num_threads(1)
    for name, (ours, theirs) in contests(n).items():
        rounds = [(ours(), theirs()) for _ in range(ROUNDS)]
        mine, other = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        print(f"{name:20} {mine:7.1f} ms {other:7.1f} ms  ratio {ratio:.2f}", flush=True)
    print(f"a block of 8 against 8 singles: {block_against_singles(n):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
