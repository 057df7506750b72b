"""Every operator, each with its matrix: one line here and all laws are tested for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from hvpop import (
    BatchForms,
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    EmpiricalFisherOperator,
    FisherOperator,
    FromFunction,
    GradientOperator,
    HessianOperator,
    Identity,
    JacobianOperator,
    Layout,
    LinearOperator,
    LowRank,
    Restriction,
)
from hvpop.operators.algebra import Transposed
from hvpop.operators.base import Memory

Case = tuple[LinearOperator, Tensor]  # the operator; its matrix, float64, computed without it

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def entries(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Normal entries, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def dense(m: int, n: int, *, seed: int = 0, dtype: torch.dtype = F64) -> Case:
    """A general matrix."""
    M = entries(m, n, seed=seed, dtype=dtype)
    return Dense(M), M.double()


def symmetric(n: int, *, seed: int = 0, dtype: torch.dtype = F64) -> Case:
    """An indefinite symmetric matrix."""
    M = entries(n, n, seed=seed, dtype=dtype)
    return Dense(M + M.T, symmetric=True), (M + M.T).double()


def diagonal(n: int, *, seed: int = 0, dtype: torch.dtype = F64) -> Case:
    """A diagonal matrix."""
    d = entries(n, seed=seed, dtype=dtype)
    return Diagonal(d), d.double().diag()


def low_rank(
    m: int, n: int | None = None, *, rank: int = 2, weights: bool = False, dtype: torch.dtype = F64
) -> Case:
    """``U diag(s) W'``, or the symmetric ``U diag(s) U'`` where n is not given."""
    U, s = entries(m, rank, dtype=dtype), entries(rank, seed=1, dtype=dtype)
    W = None if n is None else entries(n, rank, seed=2, dtype=dtype)
    middle = s.double().diag() if weights else torch.eye(rank, dtype=F64)
    matrix = U.double() @ middle @ (U if W is None else W).double().T
    return LowRank(U, s if weights else None, W), matrix


def shift(n: int) -> Case:
    """A permutation, as a function."""
    operator = FromFunction(lambda V: V.roll(1, 0), (n, n), lambda U: U.roll(-1, 0))
    return operator, torch.eye(n, dtype=F64).roll(1, 0)


def combine(make: Callable[..., LinearOperator | Tensor], *cases: Case) -> Case:
    """The same formula over operators and over matrices."""
    operator, matrix = make(*(c[0] for c in cases)), make(*(c[1] for c in cases))
    assert isinstance(operator, LinearOperator)
    assert isinstance(matrix, Tensor)
    return operator, matrix


def transposed(case: Case) -> Case:
    """The node itself, also around a symmetric operator, where ``.T`` would not make one."""
    return Transposed(case[0]), case[1].T


def block_diagonal(*cases: Case) -> Case:
    """Blocks side by side."""
    return BlockDiagonal([A for A, _ in cases]), torch.block_diag(*(M for _, M in cases))


def damped(case: Case, damping: float | Tensor | dict[str, float], diagonal: Tensor) -> Case:
    """``A + D``, in any of the three ways to say what ``D`` is."""
    return Damped(case[0], damping), case[1] + diagonal.double().diag()


class NamedDense(Dense):
    """A matrix of order 4 whose entries have parameter names, as those of a Hessian have."""

    layout = Layout(
        ("net.weight", "net.bias", "scale"), (torch.Size([2, 1]), torch.Size([1]), torch.Size([]))
    )


class LiveDense(Dense):
    """A matrix that follows its entries until it is linearized."""

    def _linearized(self, memory: Memory, done: dict[int, LinearOperator]) -> LinearOperator:
        return done.setdefault(id(self), Dense(self.matrix.clone()))


class Averaged(LinearOperator):
    """The weighted mean, or sum, of a symmetric matrix for each batch of some data."""

    def __init__(self, matrices: Tensor, weights: Tensor, *, normalized: bool = True) -> None:
        self.matrices, self.weights, self.normalized = matrices, weights.double(), normalized
        divisor = self.weights.sum() if normalized else 1.0
        mean = torch.tensordot(self.weights, matrices.double(), 1) / divisor
        self.matrix = mean.to(matrices)
        super().__init__(mean.shape, dtype=matrices.dtype, device="cpu", symmetric=True)

    def _apply(self, V: Tensor) -> Tensor:
        return self.matrix @ V

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms:
        values = (V * (self.matrices[:batches] @ V)).sum(1).double()
        return BatchForms(values, self.weights[:batches], self.normalized)


def averaged(n: int, *, normalized: bool = True) -> Case:
    """An average over four batches of unlike weights."""
    M = entries(4, n, n)
    A = Averaged(M + M.mT, torch.tensor([1.0, 3.0, 3.0, 2.0]), normalized=normalized)
    return A, A.matrix


class LevenbergMarquardt(Damped):
    """A damping rule of one's own, with an attribute of its own: ``strength * |diag(A)|``."""

    def __init__(self, A: LinearOperator, strength: float) -> None:
        super().__init__(A)
        self.strength = strength
        self.scale = A.to_dense().diagonal().abs().unsqueeze(1)

    def damping(self, V: Tensor) -> Tensor:
        return self.strength * self.scale * V


def levenberg_marquardt(case: Case, strength: float) -> Case:
    """The subclass."""
    A, matrix = case
    return LevenbergMarquardt(A, strength), matrix + strength * matrix.diagonal().abs().diag()


def problem(dtype: torch.dtype = F64) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A 3-4-2 tanh network on 7 samples in batches of 4 and 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    X, y = entries(7, 3, seed=5, dtype=dtype), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    return model, nn.CrossEntropyLoss(), [(X[:4], y[:4]), (X[4:], y[4:])]


def rows_of(model: nn.Module, numbers: Tensor) -> Tensor:
    """The gradients of some numbers, one a row."""
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in numbers]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@cache
def over_samples(kind: str) -> Case:
    """The gradients of samples, the Jacobian of outputs, and the matrices that are made of them."""
    model, loss, data = problem()
    if kind == "jacobian":
        z = torch.cat([model(x) for x, _ in data])
        return JacobianOperator(model, data), rows_of(model, z.flatten())
    losses = [loss(model(x[i : i + 1]), y[i : i + 1]) for x, y in data for i in range(len(x))]
    G = rows_of(model, torch.stack(losses))
    if kind == "gradients":
        return GradientOperator(model, loss, data), G
    if kind == "fisher":
        z = torch.cat([model(x) for x, _ in data]).detach()
        J, p = rows_of(model, torch.cat([model(x) for x, _ in data]).flatten()), z.softmax(1)
        B = torch.block_diag(*(q.diag() - q.outer(q) for q in p))
        return FisherOperator(model, loss, data), J.T @ B @ J / len(G)
    return EmpiricalFisherOperator(model, loss, data), G.T @ G / len(G)


@cache
def hessian(dtype: torch.dtype = F64) -> Case:
    """Of the network, and by double backward."""
    model, loss, data = problem(dtype)
    H = HessianOperator(model, loss, data)
    X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    exact = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    exact.load_state_dict(model.state_dict())
    parameters = list(exact.parameters())
    gradient = torch.autograd.grad(loss(exact(X.double()), y), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return H, torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def linearized(case: Case) -> Case:
    """The frozen form."""
    return case[0].linearize(), case[1]


HESSIAN_DAMPING = torch.cat([torch.full((12,), 0.5), torch.full((4,), 2.0), torch.zeros(10)])

OPERATORS: dict[str, Callable[[], Case]] = {
    "restriction": lambda: (
        Restriction(torch.tensor([3, 0, 3]), 5),
        torch.eye(5, dtype=F64)[[3, 0, 3]],
    ),
    "identity": lambda: (Identity(4), torch.eye(4, dtype=F64)),
    "identity of half precision": lambda: (Identity(3, dtype=BF16), torch.eye(3, dtype=F64)),
    "diagonal": lambda: diagonal(5),
    "diagonal float16": lambda: diagonal(3, dtype=F16),
    "dense tall": lambda: dense(5, 3),
    "dense wide": lambda: dense(2, 5),
    "dense float32": lambda: dense(4, 3, dtype=F32),
    "dense bfloat16": lambda: dense(4, 3, dtype=BF16),
    "dense symmetric": lambda: symmetric(4),
    "dense 1x1": lambda: dense(1, 1),
    "dense without rows": lambda: dense(0, 3),
    "dense without columns": lambda: dense(3, 0),
    "low rank": lambda: low_rank(5),
    "low rank weighted": lambda: low_rank(5, weights=True),
    "low rank rectangular": lambda: low_rank(4, 3, weights=True, dtype=F32),
    "low rank of rank zero": lambda: low_rank(4, rank=0),
    "from function": lambda: shift(4),
    "sum": lambda: combine(
        lambda A, B, C: A + B + C, dense(4, 3), dense(4, 3, seed=1), low_rank(4, 3)
    ),
    "difference": lambda: combine(lambda A, B: A - B, symmetric(4), shift(4)),
    "scaled": lambda: combine(lambda A: -1.5 * A, dense(3, 4)),
    "divided": lambda: combine(lambda A: A / 3, symmetric(3, dtype=F32)),
    "negative": lambda: combine(lambda A: -A, low_rank(4, 3)),
    "product": lambda: combine(
        lambda A, B, C: A @ B @ C, dense(3, 4), shift(4), dense(4, 2, seed=1)
    ),
    "gram matrix": lambda: combine(lambda A: A.T @ A, dense(3, 4)),
    "sandwich": lambda: combine(lambda P, A: P @ A @ P, low_rank(4), symmetric(4)),
    "power 0": lambda: (shift(3)[0] ** 0, torch.eye(3, dtype=F64)),
    "power 3": lambda: (dense(4, 4)[0] ** 3, dense(4, 4)[1].matrix_power(3)),
    "transpose": lambda: combine(lambda A: A.T, dense(3, 4)),
    "transpose of a product": lambda: combine(lambda A, B: (A @ B).T, dense(3, 4), shift(4)),
    "transposed symmetric": lambda: transposed(symmetric(3)),
    "damped by a number": lambda: damped(dense(4, 4), 0.1, torch.full((4,), 0.1, dtype=F64)),
    "damped half precision": lambda: damped(dense(3, 3, dtype=BF16), 0.25, torch.full((3,), 0.25)),
    "damped by entry": lambda: damped(symmetric(4), entries(4).abs(), entries(4).abs()),
    "damped by a subclass": lambda: levenberg_marquardt(symmetric(4), 0.3),
    "block diagonal": lambda: block_diagonal(dense(2, 3), symmetric(2), dense(3, 1)),
    "block diagonal with an empty block": lambda: block_diagonal(symmetric(3), diagonal(0)),
    "nested": lambda: combine(
        lambda A, B, P: (2.0 * (A + B)).T @ (P @ A - B) / 4, dense(4, 4), shift(4), low_rank(4)
    ),
    "average over batches": lambda: averaged(4),
    "average damped by a subclass": lambda: levenberg_marquardt(averaged(4), 0.3),
    "sum over batches": lambda: averaged(4, normalized=False),
    "sum over batches among others": lambda: combine(
        lambda A, B, C: -2.0 * (A / 3 + B - C),
        symmetric(4),
        averaged(4, normalized=False),
        shift(4),
    ),
    "square of an average": lambda: combine(lambda A: A @ A, averaged(4)),
    "hessian": hessian,
    "hessian float32": lambda: hessian(F32),
    "hessian linearized": lambda: linearized(hessian()),
    "hessian damped by name": lambda: damped(
        hessian(), {"0.weight": 0.5, "0.*": 2.0}, HESSIAN_DAMPING
    ),
    "gradients": lambda: over_samples("gradients"),
    "gradients linearized": lambda: linearized(over_samples("gradients")),
    "jacobian": lambda: over_samples("jacobian"),
    "jacobian linearized": lambda: linearized(over_samples("jacobian")),
    "empirical fisher": lambda: over_samples("empirical fisher"),
    "empirical fisher linearized": lambda: linearized(over_samples("empirical fisher")),
    "fisher": lambda: over_samples("fisher"),
    "hessian deflated": lambda: combine(
        lambda P, H: P @ H @ P, low_rank(26, weights=True), hessian()
    ),
}

OVER_DATA = {
    "average over batches",
    "average damped by a subclass",
    "sum over batches",
    "sum over batches among others",
    "hessian",
    "hessian float32",
    "hessian linearized",
    "hessian damped by name",
    "empirical fisher",
    "empirical fisher linearized",
    "fisher",
}


@cache
def case(name: str) -> Case:
    """One operator and its matrix, the same objects at every call."""
    return OPERATORS[name]()
