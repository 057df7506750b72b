"""Every supervised model of the zoo has the Gauss-Newton matrix that its outputs and its loss say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hvpop import GaussNewtonOperator
from hvpop.risk.rewrites import Rewrites

from .reference import buffers_restored
from .registry import Case, Problem
from .test_zoo import COMPARED, TRUSTED, built, directions, error

STEP = 2e-5  # of the larger difference, relative to the norm of the parameters


def parted(case: Case) -> bool:
    """Whether the loss is a function of one tensor of outputs, whose second derivative torch has."""
    problem = built(case)
    if problem.loss is None or problem.expected is not None or case.total:
        return False
    if case.reference != "difference" or set(problem.parameters()) - set(
        problem.model.parameters()
    ):
        return False
    with warnings.catch_warnings(), buffers_restored(problem.model):
        warnings.simplefilter("ignore")
        return isinstance(output(problem, problem.data[0][0]), Tensor)


def reference(problem: Problem, v: Tensor) -> tuple[Tensor, float]:
    """``J' B J v`` (n,), and how far two steps of differences for ``J v`` are apart.

    J v by fourth-order differences of the user's own model, B by double backward of the loss alone,
    J' by ``backward()``.
    """
    total, gap, weights = torch.zeros(0), 0.0, problem.batch_weights()
    for weight, (inputs, targets) in zip(weights, problem.data, strict=True):
        jv, coarse = (tangent(problem, inputs, v, step) for step in (STEP, 2 * STEP))
        gap = max(gap, float((jv - coarse).norm() / (jv.norm() + 1e-12)))
        with buffers_restored(problem.model):
            z = output(problem, inputs)
            leaf = z.detach().requires_grad_()
            with Rewrites():  # some losses have no second derivative of torch's
                value = loss(problem, leaf, targets)
            (g,) = torch.autograd.grad(value, leaf, create_graph=True)
            bjv = torch.zeros_like(z)
            if g.requires_grad:
                (bjv,) = torch.autograd.grad(g, leaf, jv)
            parameters = problem.parameters()
            for p in parameters:
                p.grad = None
            z.backward(bjv)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        part = weight * torch.cat([g.to_dense().double().reshape(-1) for g in grads])
        total = part if not total.numel() else total + part
    return total / sum(weights), gap


def tangent(problem: Problem, inputs: Any, v: Tensor, step: float) -> Tensor:
    point = [p.detach().clone() for p in problem.parameters()]
    length = max(1.0, float(torch.cat([p.reshape(-1) for p in point]).norm()))
    h = step * length / float(v.norm())

    def ahead(k: float) -> Tensor:
        with moved(problem, point, k * h * v), buffers_restored(problem.model):
            return output(problem, inputs).detach().clone()

    return (8 * (ahead(1) - ahead(-1)) - (ahead(2) - ahead(-2))) / (12 * h)


@contextmanager
def moved(problem: Problem, point: list[Tensor], by: Tensor) -> Iterator[None]:
    with torch.no_grad():
        pieces = by.split([p.numel() for p in point])
        for p, q, d in zip(problem.parameters(), point, pieces, strict=True):
            p.copy_(q + d.view_as(q))
    yield
    with torch.no_grad():
        for p, q in zip(problem.parameters(), point, strict=True):
            p.copy_(q)


def output(problem: Problem, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return problem.model(**inputs)
    return problem.model(*inputs) if isinstance(inputs, tuple) else problem.model(inputs)


def loss(problem: Problem, z: Tensor, targets: Any) -> Tensor:
    assert problem.loss is not None
    value: Tensor = problem.loss(z, targets)
    return value.reshape(())


PENALIZED = [c for c in COMPARED if c.name.startswith("penalty_")]
PARTED = [c for c in COMPARED if c not in PENALIZED and parted(c)]


def named(case: Case) -> str:
    return f"{case.family}-{case.name}"


@pytest.mark.parametrize("case", [c for c in PENALIZED if parted(c)], ids=named)
def test_a_penalty_is_refused(case: Case) -> None:
    problem = built(case)
    G = GaussNewtonOperator(problem.model, problem.loss, problem.data)
    with pytest.raises(ValueError, match="past the outputs of the model, as a penalty"):
        G @ torch.ones(G.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("case", PARTED, ids=named)
def test_it_is_the_jacobian_around_the_hessian_of_the_loss(case: Case) -> None:
    problem = built(case)
    V = directions(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, gap = reference(built(case), V[:, 0].double())
        assert gap < TRUSTED
        G = GaussNewtonOperator(problem.model, problem.loss, problem.data)
        A = G.linearize()
        assert error((G @ V[:, 0]).double(), expected) < case.tolerance
        assert error((A @ V[:, 0]).double(), expected) < case.tolerance
        assert error((A @ V).double(), (G @ V).double()) < case.agreement
