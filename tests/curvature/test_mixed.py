"""Mixed derivatives are those of the gradient by the inputs of the samples that were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvpop import BATCHES, HessianOperator, Identity, inputs
from hvpop.solvers import cg

from .problems import error, mlp, random, set_parameters, split
from .test_gauss_newton import EXACT, LABELS, LOSSES, MODELS, REAL, SIZES, X, risk, unmarked
from .test_jacobian import TwoHeaded


def mixed(model: nn.Module, value: Any, *given: Tensor) -> Tensor:
    """Return the derivatives of the gradient by given tensors, side by side, row by row."""
    leaves = [x.clone().requires_grad_() for x in given]
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
        gradient = torch.autograd.grad(value(*leaves), parameters, create_graph=True)
    found = []
    for entry in torch.cat([g.reshape(-1) for g in gradient]):
        row = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
        by_sample = [
            (torch.zeros_like(x) if r is None else r).reshape(len(x), -1)
            for x, r in zip(leaves, row, strict=True)
        ]
        found.append(torch.cat(by_sample, 1).reshape(-1))
    return torch.stack(found)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", LOSSES)
def test_columns_are_derivatives_of_the_gradient_by_inputs(name: str, kind: str) -> None:
    model, (loss, targets) = MODELS[kind](), LOSSES[name]
    truth = mixed(model, lambda x: loss(model(x), targets), X)
    for sizes in ([23], SIZES):
        M = HessianOperator(model, loss, split((X, targets), sizes)).mixed()
        assert M.shape == truth.shape
        V, U = random(truth.shape[1], 5), random(truth.shape[0], 5)
        for A in (M, M.linearize(), M.linearize(memory=0)):
            assert error(A @ V, truth @ V) < EXACT
            assert error(A @ V[:, 0], truth @ V[:, 0]) < EXACT
            assert error(A.T @ U, truth.mT @ U) < EXACT


def test_samples_may_be_chosen() -> None:
    model, (loss, targets) = mlp(), LOSSES["both"]
    H = HessianOperator(model, loss, split((X, targets), SIZES))
    truth = H.mixed().to_dense().reshape(43, 23, 4)
    for samples in ([0], [11, 3], [22], range(10, 19), torch.arange(4)):
        M = H.mixed(samples)
        chosen = sorted(int(i) for i in samples)
        expected = truth[:, chosen].reshape(43, -1)
        if bool(expected.any()):  # a sample with its target ignored has none
            assert error(M.to_dense(), expected) < EXACT
            assert error(M.linearize().to_dense(), expected) < EXACT
        else:
            assert not M.to_dense().any()


def test_of_several_inputs_the_columns_of_a_sample_are_those_of_all() -> None:
    model, scale = set_parameters(TwoHeaded().double()), random(23, 1, seed=3)

    def loss(z: Any, t: Tensor) -> Tensor:
        return ((torch.cat(z, 1) - t) ** 2).mean()

    H = HessianOperator(model, loss, split((X, scale, REAL), SIZES))
    truth = mixed(model, lambda x, s: loss(model(x, s), REAL), X, scale)
    assert error(H.mixed().to_dense(), truth) < EXACT


def test_batches_that_count_alike_or_nothing_are_weighted_as_in_the_hessian() -> None:
    model, targets = mlp(), LABELS.clone()
    targets[10:19] = -100
    loss = nn.CrossEntropyLoss()
    M = HessianOperator(model, loss, split((X, targets), SIZES)).mixed()
    assert error(M.to_dense(), mixed(model, lambda x: loss(model(x), targets), X)) < EXACT

    def halves(x: Tensor) -> Tensor:
        pairs = zip(x.split(SIZES), LABELS.split(SIZES), strict=True)
        return torch.stack([loss(model(a), b) for a, b in pairs]).mean()

    M = HessianOperator(model, loss, split((X, LABELS), SIZES), average=BATCHES).mixed()
    assert error(M.to_dense(), mixed(model, halves, X)) < EXACT


def test_a_minimum_moves_as_it_says() -> None:
    def fitted(x: Tensor) -> nn.Module:
        model = set_parameters(nn.Linear(4, 3).double())
        parameters = list(model.parameters())
        for _ in range(12):  # Newton's method
            H = HessianOperator(model, penalized, [(x, LABELS)])
            gradient = torch.autograd.grad(penalized(model(x), LABELS, model), parameters)
            flat = torch.cat([g.reshape(-1) for g in gradient])
            A = H.linearize() + 0.1 * Identity.like(H)
            step = cg(A, flat, rtol=1e-13).x
            with torch.no_grad():
                for p, d in zip(parameters, H.layout.unflatten(step).values(), strict=True):
                    p -= d
        return model

    def penalized(z: Tensor, t: Tensor, model: nn.Module | None = None) -> Tensor:
        value = F.cross_entropy(z, t)
        if model is None:
            return value
        return value + 0.05 * sum(p.square().sum() for p in model.parameters())

    change, h = random(23, 4, seed=5), 1e-4
    ends = [torch.nn.utils.parameters_to_vector(fitted(X + s * h * change).parameters())
            for s in (1, -1)]  # fmt: skip
    model = fitted(X)
    H = HessianOperator(model, penalized, [(X, LABELS)])
    A = H.linearize() + 0.1 * Identity.like(H)
    moved = -cg(A, H.mixed() @ change.reshape(-1), rtol=1e-12).x
    assert error((ends[0] - ends[1]).detach() / (2 * h), moved) < 1e-6  # a third derivative of h^2


def test_inputs_that_are_not_marked_or_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\(model\(hvpop\.inputs\(x\)\), y\)"):
        HessianOperator.from_risk(risk(unmarked)).mixed()

    def marked(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(inputs(batch[0])), batch[1])

    M = HessianOperator.from_risk(risk(marked)).mixed()
    model = mlp()
    truth = mixed(model, lambda x: F.cross_entropy(model(x), LABELS), X)
    assert error(M.to_dense(), truth) < EXACT
    tokens = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    data = [(torch.ones(4, 2, dtype=torch.int64), LABELS[:4])]
    with pytest.raises(ValueError, match="or they are no floating point numbers"):
        HessianOperator(tokens, nn.CrossEntropyLoss(), data).mixed()


def test_samples_are_indices_each_once() -> None:
    H = HessianOperator(mlp(), nn.MSELoss(), split((X, REAL), SIZES))
    for wrong in ([], [3, 3], [-1]):
        with pytest.raises(ValueError, match="the indices of some samples, each once"):
            H.mixed(wrong)
    with pytest.raises(IndexError, match="samples from 0 to 22, in the order of the data, got 23"):
        H.mixed([2, 23])


def test_the_mark_is_the_identity_otherwise() -> None:
    x = random(3)
    assert inputs(x) is x
