"""Every supervised model of the zoo has the gradients of samples that backward passes give, or is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from hvpop import GradientOperator, JacobianOperator
from hvpop.risk.samples import COLUMNS, READINGS

from .reference import buffers_restored
from .registry import Case, Problem
from .test_gauss_newton import PARTED, named, output, tangent
from .test_zoo import TRUSTED, built, directions, error

COUPLED = {
    "attention-mha_padded",  # pads by place in the batch
    "derivatives-inner_gradient_step",
    "functions-index_put",
    "functions-masked_select",
    "functions-multi_dot",
    "functions-pdist",
    "functions-tensordot",
    "layers-embedding_scaled_by_frequency",
    "losses-contrastive",
    "losses-dice",
    "models-contrastive_pair_with_temperature",
    "models-gaussian_process",
    "models-graph_convolution",
    "models-loop_until_converged",
    "models-neural_process_of_survival",
    "models-neural_radiance_positional_encoding",  # accumulates along the samples
    "norms-batch_norm1d_cumulative",
    "norms-batch_norm1d_plain_train",
    "norms-batch_norm1d_train",
    "norms-batch_norm1d_without_statistics",
    "norms-batch_norm1d_without_statistics_eval",
    "norms-batch_norm2d_train",
    "parameters-hypernetwork_by_call",
    "parameters-used_in_one_batch",
    "recurrent-packed_gru",  # lengths by place in the batch
    "recurrent-packed_lstm",
    "recurrent-packed_rnn",
}
APART = [case for case in PARTED if named(case) not in COUPLED]


def gradient(problem: Problem, batch: object) -> Tensor:
    """Return the gradient of one batch by a plain backward pass."""
    parameters = problem.parameters()
    for p in parameters:
        p.grad = None
    with buffers_restored(problem.model):
        problem.value(batch).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.to_dense().double().reshape(-1) for g in found])


def of_one(batch: object, i: int) -> object:
    """Return sample i of a batch, as a batch."""
    reading = next(r for r in READINGS if r.count(batch))
    return reading.part(batch, slice(i, i + 1))


@pytest.mark.parametrize("case", [c for c in PARTED if named(c) in COUPLED], ids=named)
def test_samples_that_are_not_by_themselves_are_refused(case: Case) -> None:
    problem = built(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        G = GradientOperator(problem.model, problem.loss, problem.data)
        with pytest.raises(ValueError, match="part of a batch by itself"):
            G @ torch.ones(G.shape[1], dtype=G.torch_dtype)


@pytest.mark.parametrize("case", APART, ids=named)
def test_rows_are_gradients_of_samples_and_add_up(case: Case) -> None:
    problem = built(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        G = GradientOperator(problem.model, problem.loss, problem.data)
        first = problem.data[0]
        count = next(n for r in READINGS if (n := r.count(first)))
        for i in {0, count - 1}:
            truth = gradient(problem, of_one(first, i))
            unit = torch.zeros(G.shape[0], dtype=G.torch_dtype)
            unit[i] = 1.0
            found = (G.T @ unit).double()
            assert float((found - truth).norm()) <= case.tolerance * max(float(truth.norm()), 1e-3)
        weights = problem.batch_weights()
        total = sum(
            w * gradient(problem, batch) for w, batch in zip(weights, problem.data, strict=True)
        )
        assert isinstance(total, Tensor)
        assert error((G.T @ G.weights.to(G.torch_dtype)).double(), total / sum(weights)) < (
            case.tolerance
        )
        v = directions(problem)[:, 0]
        u = torch.linspace(-1, 1, G.shape[0], dtype=v.dtype)
        size = float(u.norm() * (G @ v).norm()) + 1e-12
        assert abs(float(u @ (G @ v) - v @ (G.T @ u))) <= case.agreement * size


@pytest.mark.parametrize("case", PARTED, ids=named)
def test_a_jacobian_times_a_vector_is_the_difference_of_outputs(case: Case) -> None:
    problem = built(case)
    if COLUMNS.count(problem.data[0]) is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        J = JacobianOperator(problem.model, problem.data)
        v = directions(problem)[:, 0]
        parts = []
        for inputs, _ in problem.data:
            with buffers_restored(problem.model):
                assert isinstance(output(problem, inputs), Tensor)
            fine, coarse = (tangent(problem, inputs, v.double(), h) for h in (2e-5, 4e-5))
            assert float((fine - coarse).norm()) <= TRUSTED * (float(fine.norm()) + 1e-12)
            parts.append(fine.double().reshape(-1))
        assert error((J @ v).double(), torch.cat(parts)) < case.tolerance
