"""Matrices with prescribed spectra, operators that count or fail, and the Hessian on digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from hvpop import Dense, FromFunction, LinearOperator

F64 = torch.float64
EPS = torch.finfo(F64).eps


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors in the same order."""
    n = eigenvalues.shape[0]
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator(seed)))
    M = (Q * eigenvalues.to(F64)) @ Q.T
    return (M + M.T) / 2, Q


def dense(eigenvalues: Tensor, seed: int = 0) -> Dense:
    return Dense(matrix(eigenvalues, seed)[0], symmetric=True)


SPECTRA: dict[str, Tensor] = {
    "spread": torch.linspace(-1.0, 2.0, 150, dtype=F64),
    "clustered": torch.cat([1 + 1e-3 * torch.arange(6), torch.linspace(-0.5, 0.5, 144)]).to(F64),
    "rank deficient": torch.cat([torch.linspace(1, 2, 12), torch.zeros(138)]).to(F64),
    "indefinite": torch.cat([-3 * 0.8 ** torch.arange(75), 2 * 0.8 ** torch.arange(75)]).to(F64),
    "condition 1e8": torch.logspace(-8, 0, 150, dtype=F64),
    "multiple": (0.8 ** torch.arange(50)).repeat_interleave(3).to(F64),
}


class Watched:
    """An operator that counts its products and passes, and fails at a chosen one."""

    def __init__(
        self,
        A: LinearOperator,
        fail_at: int | None = None,
        error: type[BaseException] = RuntimeError,
    ) -> None:
        self.products = self.passes = 0
        self.fail_at, self.error, self.A = fail_at, error, A
        self.operator = FromFunction(
            self.product(lambda V: A @ V),
            A.shape,
            self.product(lambda U: A.T @ U),
            dtype=A.torch_dtype,
            symmetric=A.symmetric,
        )

    def product(self, apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def watched(V: Tensor) -> Tensor:
            if self.fail_at is not None and self.passes + 1 >= self.fail_at:
                raise self.error("stop")
            self.products += V.shape[1]
            self.passes += 1
            return apply(V)

        return watched


def digits_hessians(*epochs: int) -> list[LinearOperator]:
    """Hessians of a tanh network on the digits after so many steps of Adam, by double backward."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X[:600] / 16.0), torch.tensor(y[:600])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)
        ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    hessians = []
    for step in range(max(epochs) + 1):
        if step in epochs:
            hessians.append(_hessian(model, X, y))
        optimizer.zero_grad()
        cross_entropy(model(X), y).backward()
        optimizer.step()
    return hessians


def _hessian(model: torch.nn.Module, X: Tensor, y: Tensor) -> LinearOperator:
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    loss = cross_entropy(
        torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (X,)), y
    )
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in gradients])

    def apply(V: Tensor) -> Tensor:
        columns = torch.autograd.grad(
            gradient, parameters, V.T.contiguous(), retain_graph=True, is_grads_batched=True
        )
        return torch.cat([c.reshape(c.shape[0], -1) for c in columns], 1).T

    n = gradient.shape[0]
    return FromFunction(apply, (n, n), symmetric=True)
