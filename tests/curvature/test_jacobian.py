"""The rows of a Jacobian are those of outputs, whatever these are; around B it is Gauss-Newton."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

from hvpop import (
    BlockDiagonal,
    Dense,
    GaussNewtonOperator,
    JacobianOperator,
)

from .problems import error, mlp, random, set_parameters, split
from .test_gauss_newton import (
    EXACT,
    LOSSES,
    MODELS,
    REAL,
    SIZES,
    STRATEGIES,
    X,
    marked,
    normed,
    risk,
)
from .test_gradients import TEXT, normalized, tagger


def rows(model: nn.Module, z: Tensor) -> Tensor:
    """Return the gradient of each entry of z, one a row."""
    parameters = list(model.parameters())
    found = [torch.autograd.grad(e, parameters, retain_graph=True) for e in z.flatten()]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in found])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sizes", [[23], SIZES, [1] * 23])
def test_rows_are_the_derivatives_of_outputs_sample_by_sample(kind: str, sizes: list[int]) -> None:
    model = MODELS[kind]()
    truth = rows(model, model(X))
    for data in (split((X, REAL), sizes), list(X.split(sizes)), [(x,) for x in X.split(sizes)]):
        J = JacobianOperator(model, data)
        assert J.shape == truth.shape
        assert error(J.to_dense(), truth) < EXACT
    U = random(69, 3)
    for A in (J, J.linearize(), J.linearize(memory=0)):
        assert error(A @ truth.mT, truth @ truth.mT) < EXACT
        assert error(A.T @ U, truth.mT @ U) < EXACT


@STRATEGIES
@pytest.mark.parametrize("linearized", [False, True])
def test_every_strategy_gives_it(strategy: Any, tolerance: float, linearized: bool) -> None:
    model = normed()
    truth = rows(model, model(X))
    J = JacobianOperator(model, split((X, REAL), SIZES), strategy=copy.copy(strategy))
    A = J.linearize() if linearized else J
    V, U = random(A.shape[1], 9, seed=5), random(69, 9, seed=6)
    assert error(A @ V, truth @ V) < tolerance
    assert error(A @ V[:, 0], truth @ V[:, 0]) < tolerance
    assert error(A.T @ U, truth.mT @ U) < EXACT
    assert error(A.T @ U[:, 0], truth.mT @ U[:, 0]) < EXACT


@pytest.mark.parametrize("name", LOSSES)
def test_around_the_hessian_of_the_loss_it_is_gauss_newton(name: str) -> None:
    model, (loss, targets) = mlp(), LOSSES[name]
    data = split((X, targets), SIZES)
    G = GaussNewtonOperator(model, loss, data)
    weights = [term.weight for term in G.risk.terms()]
    blocks = []
    for (x, t), weight in zip(data, weights, strict=True):
        z = model(x).detach()

        def value(flat: Tensor, z: Tensor = z, t: Tensor = t) -> Tensor:
            result: Tensor = loss(flat.view_as(z), t)
            return result

        B: Any = torch.autograd.functional.hessian(value, z.flatten())
        blocks.append(Dense(weight / sum(weights) * B))
    J = JacobianOperator(model, data)
    V = random(43, 3)
    assert error(J.T @ BlockDiagonal(blocks) @ J @ V, G @ V) < EXACT


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


class TwoHeaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(outputs=5), nn.Linear(5, 1)

    def forward(self, x: Tensor, scale: Tensor) -> Pair:
        h = self.body(x).tanh()
        return Pair(h[:, :2] * scale, self.head(h))


def test_of_several_outputs_the_rows_of_a_sample_are_those_of_all() -> None:
    model, scale = set_parameters(TwoHeaded().double()), random(23, 1, seed=3)
    z = torch.cat(model(X, scale), 1)
    for sizes in ([23], SIZES):
        data = split((X, scale, REAL), sizes)
        by_name = [{"x": x, "scale": s, "labels": t} for x, s, t in data]
        for batches in (data, by_name):
            assert error(JacobianOperator(model, batches).to_dense(), rows(model, z)) < EXACT


def test_outputs_may_have_any_shape_and_depend_on_all_of_a_batch() -> None:
    for model, x in ((tagger(), TEXT), (normalized(), X)):
        J = JacobianOperator(model, [x])
        own = copy.deepcopy(model)
        assert error(J.to_dense(), rows(own, own(x))) < EXACT
    J = JacobianOperator(tagger(), list(TEXT.split([4, 5])))
    own = tagger()
    assert error(J.to_dense(), rows(own, own(TEXT))) < EXACT


def test_what_a_risk_marks_is_what_it_is_of() -> None:
    own = mlp()
    J = JacobianOperator.from_risk(risk(marked, own))
    assert error(J.to_dense(), rows(own, own(X))) < EXACT


def test_a_gauss_newton_step_is_a_least_squares_solution() -> None:
    model = mlp()
    J, r = JacobianOperator(model, [(X, REAL)]), (model(X) - REAL).detach().flatten()
    found = lsmr(J.linearize(), r.numpy(), damp=0.1, atol=1e-13, btol=1e-13, maxiter=500)[0]
    A = torch.cat([J.to_dense(), 0.1 * torch.eye(43, dtype=torch.float64)])
    truth = torch.linalg.lstsq(A, torch.cat([r, torch.zeros(43, dtype=torch.float64)])).solution
    assert error(found, truth) < 1e-9


def test_outputs_without_an_order_or_a_derivative_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.body, self.kind = mlp(), kind

        def forward(self, x: Tensor) -> Any:
            z = self.body(x)
            return (z, z.sum(0)[:2]) if self.kind == "shapes" else z.argmax(1)

    with pytest.raises(ValueError, match="first dimensions are not the same"):
        JacobianOperator(Odd("shapes"), [X]) @ random(43)
    with pytest.raises(ValueError, match="Odd returned no tensor of floating point"):
        JacobianOperator(Odd("classes"), [X])
