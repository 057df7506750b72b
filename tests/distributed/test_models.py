"""Models held in parts and not gathered: differences of gradients, and exact products that stand them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from hvpop import EmpiricalRisk, HessianOperator, Identity, _torch
from hvpop.distributed import Sharded, ShardedModelHessian, Team
from hvpop.solvers import cg
from hvpop.strategies import FiniteDifference, ReverseOverReverse

from . import worlds
from .test_gathered import batches, network, sharded, trained

ERROR = 1e-8
"""Of differences in float64, relative: eps ** (2 / 3), 4e-11, by what third derivatives and rounding make of it."""


def vectors(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def expected(kind: str, V: Tensor) -> np.ndarray:
    H = HessianOperator(network(kind), nn.CrossEntropyLoss(), batches(kind))
    return (H @ V).numpy()


def by_differences(team: Team, kind: str, mine: int) -> Any:
    data = batches(kind)
    own = data[:mine] if team.rank == 0 else data[mine:]
    untouched = trained(sharded(kind), data)
    model = sharded(kind)
    H = ShardedModelHessian(EmpiricalRisk(model, nn.CrossEntropyLoss(), own), FiniteDifference())
    V = vectors(H.shape[0], 2)
    S = Sharded(H)
    found, errors = {"whole": (H @ V).numpy()}, [H.error]
    found["parts"] = S.space.whole(S @ S.space.own(V)).numpy()
    assert f"relative error {H.error:.1e}, at most" in H.report()
    errors.append(H.error)
    assert all(p.grad is None for p in model.parameters())
    steps = trained(model, data)
    return found, errors, all((a == b).all() for a, b in zip(steps, untouched, strict=True))


@pytest.mark.parametrize("mine", [3, 4])  # batches on the first process, of four
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_sharded_model_is_differentiated_by_differences_and_trains_on_as_it_would_have(
    kind: str, mine: int
) -> None:
    for found, errors, same in worlds.all_of(by_differences, 2, kind, mine):
        Z = expected(kind, vectors(sum(p.numel() for p in network(kind).parameters()), 2))
        for how, error in zip(("whole", "parts"), errors, strict=True):
            off = np.linalg.norm(found[how] - Z, axis=0) / np.linalg.norm(Z, axis=0)
            assert off.max() <= 2 * error < ERROR  # which is of two roundings, not a bound
        assert same


def solved(team: Team) -> Any:
    data = batches("mlp")
    H = ShardedModelHessian(
        EmpiricalRisk(
            sharded("mlp"), nn.MSELoss(), [(x, x[:, :3]) for x, _ in data[team.rank :: 2]]
        ),
        FiniteDifference(),
    )
    S = Sharded(H)
    b = S.space.own(vectors(H.shape[0], 1))
    return S.space.whole(cg(S + 10.0 * Identity.like(S), b, rtol=1e-6).x).numpy()


def test_a_solver_of_vectors_in_parts_runs_on_a_model_in_parts() -> None:
    data = [(x, x[:, :3]) for x, _ in batches("mlp")]
    H = HessianOperator(network("mlp"), nn.MSELoss(), data)
    M = H.to_dense() + 10 * torch.eye(H.shape[0], dtype=torch.float64)
    x = torch.linalg.solve(M, vectors(H.shape[0], 1)).numpy()
    first, second = worlds.all_of(solved, 2)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, x, rtol=0, atol=1e-5 * abs(x).max())


def in_parallel(kind: str) -> nn.Module:
    """Tensor parallel, in torch's own way; of the transformer the two layers after attention."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = network(kind)
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if kind == "transformer":
        plan = {"0.linear1": ColwiseParallel(), "0.linear2": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def tensor_parallel(team: Team, kind: str, exactly: bool) -> Any:
    model = in_parallel(kind)
    strategy = ReverseOverReverse() if exactly else FiniteDifference()
    H = ShardedModelHessian(EmpiricalRisk(model, nn.CrossEntropyLoss(), batches(kind)), strategy)
    return (H @ vectors(H.shape[0], 2)).numpy()


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_tensor_parallel_model_is_differentiated_by_differences(kind: str) -> None:
    Z = expected(kind, vectors(sum(p.numel() for p in network(kind).parameters()), 2))
    for found in worlds.all_of(tensor_parallel, 2, kind, False):
        np.testing.assert_allclose(found, Z, rtol=0, atol=ERROR * abs(Z).max())


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_exact_products_of_a_tensor_parallel_model_are_right_or_refused_by_parameter(
    kind: str,
) -> None:
    Z = expected(kind, vectors(sum(p.numel() for p in network(kind).parameters()), 2))
    for outcome in worlds.run(tensor_parallel, 2, kind, True):
        if outcome.error:
            assert outcome.error == "TypeError", outcome
            assert "use FiniteDifference()" in outcome.message
        else:
            np.testing.assert_allclose(outcome.value, Z, rtol=0, atol=1e-12 * abs(Z).max())


class Wrong(torch.autograd.Function):
    """A square whose gradient is right, and whose second derivative is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0].detach() * g


class Squared(nn.Sequential):
    wrong = True

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = super().forward(x)
        found: Tensor = Wrong.apply(z) if self.wrong else z * z
        return found


def test_a_second_derivative_that_differences_do_not_bear_out_is_refused_by_parameter() -> None:
    torch.manual_seed(0)
    model = Squared(nn.Linear(4, 3)).double()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batches("mlp"))
    with pytest.raises(TypeError, match=r"0\.weight is off by \d+% from differences"):
        ShardedModelHessian(risk, ReverseOverReverse()) @ vectors(15, 1)


def test_exact_products_are_compared_again_when_a_setting_has_changed() -> None:
    torch.manual_seed(0)
    model = Squared(nn.Linear(4, 3)).double()
    H = ShardedModelHessian(
        EmpiricalRisk(model, nn.CrossEntropyLoss(), batches("mlp")), ReverseOverReverse()
    )
    model.wrong = False
    right = H @ vectors(15, 1)
    assert torch.equal(H @ vectors(15, 1), right)
    assert H.error is None
    assert "exact" in H.report()
    model.wrong = True
    with pytest.raises(TypeError, match="from differences"):
        H @ vectors(15, 1)


def single(team: Team, kind: str) -> Any:
    data = [(x.float(), y) for x, y in batches(kind)[team.rank :: 2]]
    model = sharded(kind, torch.float32)
    H = ShardedModelHessian(EmpiricalRisk(model, nn.CrossEntropyLoss(), data), FiniteDifference())
    return (H @ vectors(H.shape[0], 1).float()).numpy(), H.error


def test_differences_in_single_precision_say_how_far_they_are_off() -> None:
    for found, error in worlds.all_of(single, 2, "mlp"):
        V = vectors(len(found), 1).float().double()
        Z = expected("mlp", V)
        off = np.linalg.norm(found - Z) / np.linalg.norm(Z)
        assert off <= 2 * error < 1e-2  # eps ** (2 / 3), 2e-5, and what derivatives make of it


def test_kinks_that_steps_of_single_precision_cross_are_warned_of() -> None:
    for outcome in worlds.run(single, 2, "transformer"):  # whose two layers have a ReLU between
        assert outcome.error == "UserWarning"
        assert "as where the model has kinks" in outcome.message


def far_off(team: Team) -> float:
    data = batches("mlp")[team.rank :: 2]
    H = ShardedModelHessian(
        EmpiricalRisk(sharded("mlp"), nn.CrossEntropyLoss(), data), FiniteDifference(0.02)
    )
    H @ vectors(H.shape[0], 1)
    error = H.error
    assert torch.equal(H @ torch.zeros(H.shape[0]).double(), torch.zeros(H.shape[0]).double())
    assert H.error == 0
    assert error is not None
    assert f"at most {error:.1e}" in H.report()
    return error


def test_a_step_that_is_too_large_shows_in_the_error() -> None:
    first, second = worlds.all_of(far_off, 2)
    assert first == second > 1e-4


def exactly(team: Team) -> None:
    risk = EmpiricalRisk(sharded("mlp"), nn.CrossEntropyLoss(), batches("mlp"))
    ShardedModelHessian(risk, ReverseOverReverse())


def test_exact_products_of_a_sharded_model_are_refused_with_both_ways_out() -> None:
    for outcome in worlds.run(exactly, 2):
        assert outcome.error == "TypeError"
        assert "gathered(model)" in outcome.message
        assert "FiniteDifference()" in outcome.message


def test_a_loss_that_does_not_say_what_it_divides_by_is_refused() -> None:
    risk = EmpiricalRisk(network("mlp"), lambda z, y: (z**2).mean(), batches("mlp"))
    with pytest.raises(ValueError, match=r"Average\(weight="):
        ShardedModelHessian(risk, FiniteDifference())


def failing(team: Team) -> None:
    def data() -> Any:
        yield batches("mlp")[0]
        if team.rank == 1:
            raise OSError("no such shard")

    class Data:
        def __iter__(self) -> Any:
            return data()

    risk = EmpiricalRisk(sharded("mlp"), nn.CrossEntropyLoss(), Data())
    H = ShardedModelHessian(risk, FiniteDifference())
    H @ vectors(H.shape[0], 1)


def test_data_that_fail_on_one_process_fail_on_all_and_leave_the_parameters() -> None:
    for outcome in worlds.run(failing, 2):
        assert outcome.error == "RemoteError"
        assert "rank 1 of 2: OSError: no such shard" in outcome.message


def divided(team: Team) -> Any:
    model = sharded("mlp")
    for part in model.modules():
        if _torch.is_fsdp2(part):
            named = "set_gradient_divide_factor"  # since 2.8
            getattr(part, named, getattr(part, "set_reduce_scatter_divide_factor", None))(1.0)
    parts = [part for part in model.modules() if _torch.is_fsdp2(part)]
    before = list(map(_torch.resharding, parts))
    mine = batches("mlp")[team.rank :: 2]
    H = ShardedModelHessian(EmpiricalRisk(model, nn.CrossEntropyLoss(), mine), FiniteDifference())
    found = (H @ vectors(H.shape[0], 1)).numpy()
    return found, list(map(_torch.resharding, parts)) == before


def test_a_divisor_of_gradients_is_put_aside_and_put_back() -> None:
    for found, same in worlds.all_of(divided, 2):
        Z = expected("mlp", vectors(len(found), 1))
        np.testing.assert_allclose(found, Z, rtol=0, atol=ERROR * abs(Z).max())
        assert same


def refused(team: Team, how: str) -> None:
    data, settings = batches("mlp")[team.rank :: 2], {}
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("both", "one"))
    if how == "nan" and team.rank == 1:
        data[0][0][0, 0] = torch.nan
    if how == "half":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = mesh["one" if how == "some" else "both"]
    model = fully_shard(network("mlp"), mesh=mesh, **settings)
    H = ShardedModelHessian(EmpiricalRisk(model, nn.CrossEntropyLoss(), data), FiniteDifference())
    H @ vectors(H.shape[0], 1)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("nan", "FloatingPointError", "a product is not finite"),
        ("half", "TypeError", "without a MixedPrecisionPolicy in half precision"),
        ("some", "ValueError", "is spread over 1 of 2 processes"),
    ],
)
def test_what_would_be_silently_wrong_is_refused_on_all(how: str, error: str, said: str) -> None:
    for outcome in worlds.run(refused, 2, how):
        assert outcome.error == error
        assert said in outcome.message
