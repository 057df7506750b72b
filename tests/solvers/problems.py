"""Matrices with prescribed spectra, operators that count, and the Hessians that figures are about."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hvpop import Dense, FromFunction, HessianOperator, LinearOperator

F64, F32 = torch.float64, torch.float32
EPS = torch.finfo(F64).eps
N = 120


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64).to(dtype)


def matrix(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors in the same order."""
    n = eigenvalues.shape[0]
    Q = torch.linalg.qr(normal(n, n, seed=seed + 1000)).Q
    M = (Q * eigenvalues) @ Q.T
    return (M + M.T) / 2, Q


def dense(eigenvalues: Tensor, seed: int = 0, dtype: torch.dtype = F64) -> Dense:
    return Dense(matrix(eigenvalues.to(F64), seed)[0].to(dtype), symmetric=True)


def powers(lowest: float, n: int = N) -> Tensor:
    """From 10^lowest to 1, evenly in the logarithm."""
    return torch.logspace(lowest, 0, n, dtype=F64)


DEFINITE: dict[str, Tensor] = {
    "clustered": torch.cat([torch.linspace(0.99, 1.01, 60), torch.linspace(9.9, 10.1, 60)]).to(F64),
    "spread": powers(-3),
    "condition 1e8": powers(-8),
    "few and large": torch.cat([1e8 * torch.rand(20, generator=generator(3)), torch.ones(100)]).to(
        F64
    ),
}
SINGULAR: dict[str, Tensor] = {
    "rank deficient": torch.cat([torch.zeros(40), torch.linspace(1, 5, 80)]).to(F64),
    "low rank": torch.cat([torch.zeros(110), torch.linspace(1, 5, 10)]).to(F64),
}
INDEFINITE: dict[str, Tensor] = {
    "indefinite": torch.cat([-powers(-2, 60), powers(-2, 60)]),
    "indefinite, condition 1e8": torch.cat([-powers(-8, 60), powers(-8, 60)]),
    "indefinite, rank deficient": torch.cat([-powers(-1, 40), torch.zeros(40), powers(-1, 40)]).to(
        F64
    ),
}


def rounding(A: Tensor, X: Tensor, B: Tensor) -> Tensor:
    """What two ways to add up the entries of ``B - A X`` may differ by, in norm, ``(k,)`` or 0-dim.

    Rounding errors of a sum are of either sign: they grow like the size of its terms taken together,
    ``|A| |X|`` here with the Frobenius norm, and not like their number (Higham and Mary 2019). Typical
    differences are a tenth of this.
    """
    size: Tensor = A.norm() * X.norm(dim=0) + B.norm(dim=0)
    return torch.finfo(X.dtype).eps * size


class Watched:
    """An operator that counts the columns and the passes of its products."""

    def __init__(self, A: LinearOperator, fail_at: int | None = None) -> None:
        self.products = self.passes = 0
        self.widths: list[int] = []

        def count(V: Tensor) -> Tensor:
            if self.passes == fail_at:
                raise KeyboardInterrupt
            self.passes += 1
            self.products += V.shape[1]
            self.widths.append(V.shape[1])
            return V

        self.operator = FromFunction(
            lambda V: A @ count(V),
            A.shape,
            lambda U: A.T @ count(U),
            dtype=A.torch_dtype,
            symmetric=A.symmetric,
        )


def digits_hessian() -> LinearOperator:
    """The linearized Hessian of a 64-32-10 network on all digits, after 220 steps of training.

    Its lowest eigenvalue is about -9e-4: a damping of 1e-3 is just enough.
    """
    digits = load_digits()
    X, y = torch.as_tensor(digits.data / 16), torch.as_tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(220):
        optimizer.zero_grad()
        cross_entropy(model(X), y).backward()
        optimizer.step()
    return HessianOperator(model, nn.CrossEntropyLoss(), [(X, y)]).linearize()


def tiny_hessian() -> LinearOperator:
    """The linearized Hessian of a 10-16-3 network on 100 samples: the overhead is all the time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    X, y = normal(100, 10), torch.randint(0, 3, (100,), generator=generator(1))
    return HessianOperator(model, nn.CrossEntropyLoss(), [(X, y)]).linearize()
