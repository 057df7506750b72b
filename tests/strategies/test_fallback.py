"""The default strategy steps down once, with a warning; an explicit one never does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import FiniteDifference, ForwardOverReverse, HessianOperator, ReverseOverReverse
from hvpop.strategies import FirstThatWorks, NoSecondDerivativeError
from tests.curvature.problems import error, random
from tests.functions import Cube, CubeOnce

from .problems import hessian, small

pytestmark = pytest.mark.filterwarnings(
    "ignore:batches are weighted by"
)  # losses that are no means


def segments(out: Tensor, y: Tensor) -> Tensor:
    """A loss with an op that has no double backward."""
    lengths = torch.tensor([2, len(out) - 2])
    pooled = torch.segment_reduce(out.tanh(), "sum", lengths=lengths)
    return (pooled**2).mean() + (out - y).square().mean()


def by_hand(out: Tensor, y: Tensor) -> Tensor:
    pooled = torch.stack([out.tanh()[:2].sum(0), out.tanh()[2:].sum(0)])
    return (pooled**2).mean() + (out - y).square().mean()


def test_the_default_falls_back_once_and_says_why() -> None:
    H = hessian(None, segments)
    assert repr(H) == "<26x26 HessianOperator float64 cpu>"
    v = random(26)
    with pytest.warns(UserWarning, match="no double backward") as record:
        first = H @ v
    (message,) = (str(w.message) for w in record if "no double backward" in str(w.message))
    assert "the op _segment_reduce_backward has no double backward" in message
    assert "using FiniteDifference() for this operator instead" in message
    second, block = H @ v, H @ random(26, 2)  # warnings are errors here
    assert torch.equal(first, second)
    assert error(first, hessian(None, by_hand) @ v) < 1e-6
    assert error(block, hessian(None, by_hand) @ random(26, 2)) < 1e-6
    assert "FiniteDifference()" in repr(H)
    assert H.linearize().report().strategy == "FiniteDifference()"


@torch.library.custom_op("hvpop_tests::fourth", mutates_args=())
def fourth(x: Tensor) -> Tensor:
    return x**4


@torch.library.custom_op("hvpop_tests::fourth_backward", mutates_args=())
def fourth_backward(g: Tensor, x: Tensor) -> Tensor:
    return 4 * g * x**3


fourth.register_autograd(
    lambda ctx, g: fourth_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_an_op_of_ones_own_whose_backward_is_an_op_without_one_is_stepped_down_from() -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (fourth(out) - y).square().mean()

    H = hessian(None, loss)
    v = random(26)
    with pytest.warns(UserWarning, match="the op hvpop_tests.fourth_backward.default has no deriv"):
        found = H @ v
    assert error(found, hessian(None, lambda out, y: (out**4 - y).square().mean()) @ v) < 1e-6
    with pytest.raises(NoSecondDerivativeError, match="FiniteDifference"):
        hessian(ReverseOverReverse(), loss) @ v


def test_a_linearized_operator_falls_back_too() -> None:
    A = hessian(None, segments).linearize()
    v = random(26)
    with pytest.warns(
        UserWarning, match="_segment_reduce_backward has no double backward"
    ) as record:
        product = A @ v
    assert sum("no double backward" in str(w.message) for w in record) == 1
    assert error(product, hessian(None, by_hand) @ v) < 1e-6
    assert torch.equal(A @ v, product)
    assert A.report().strategy == "FiniteDifference()"


def test_operators_fall_back_each_for_itself() -> None:
    with pytest.warns(UserWarning, match="no double backward"):
        hessian(None, segments) @ random(26)
    assert "Finite" not in repr(hessian(None))
    with pytest.warns(UserWarning, match="no double backward"):
        hessian(None, segments) @ random(26)


@pytest.mark.parametrize("columns", [(), (2,)])
@pytest.mark.parametrize("strategy", [ReverseOverReverse(), ForwardOverReverse()], ids=repr)
def test_an_explicit_strategy_raises_with_a_hint(strategy: Any, columns: tuple[int, ...]) -> None:
    H = hessian(strategy, segments)
    message = (
        rf"{type(strategy).__name__}\(\): the op \S*segment_reduce\S* has no .*; "
        r"strategy=FiniteDifference\(\) needs first derivatives only; strategy=None falls back"
    )
    for operator in (H, H.linearize()):
        with pytest.raises(NoSecondDerivativeError, match=message):
            operator @ random(26, *columns)


def test_an_explicit_chain_falls_back_in_its_order() -> None:
    H = hessian(
        FirstThatWorks(ForwardOverReverse(), ReverseOverReverse()),
        lambda out, y: (Cube.apply(out) - y).square().mean(),
    )
    v = random(26)
    with pytest.warns(UserWarning, match=r"has no jvp; using ReverseOverReverse\(\) for this"):
        product = H @ v
    truth = hessian(None, lambda out, y: (out**3 - y).square().mean()) @ v
    assert error(product, truth) < 1e-12


def test_a_chain_that_ends_raises() -> None:
    H = hessian(FirstThatWorks(ForwardOverReverse(), ReverseOverReverse()), segments)
    with pytest.warns(UserWarning, match="using Reverse"), pytest.raises(NoSecondDerivativeError):
        H @ random(26)


def test_errors_of_the_users_code_pass_through() -> None:
    def wrong(out: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 do not fit")

    for strategy in (None, ReverseOverReverse(), ForwardOverReverse(), FiniteDifference()):
        with pytest.raises(RuntimeError, match=r"^mat1 and mat2 do not fit$"):
            hessian(strategy, wrong) @ random(26)


# -- forward mode has traps of its own ---------------------------------------------------------------


def with_target(out: Tensor, y: Tensor) -> Tensor:
    """A loss with a part that its author takes as constant."""
    with torch.no_grad():
        target = out.tanh() + 1
        with torch.enable_grad():
            inner = out * 2
    return (out - target).square().mean() + (inner**2).mean()


def test_forward_mode_stops_where_gradients_stop() -> None:
    v = random(26)
    assert (
        error(hessian(ForwardOverReverse(), with_target) @ v, hessian(None, with_target) @ v)
        < 1e-12
    )


def test_scripted_models_are_refused_by_forward_mode() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(small()[0])
    H = HessianOperator(model, nn.MSELoss(), small()[1], strategy=ForwardOverReverse())
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(
        NoSecondDerivativeError, match="ScriptModules has no forward-mode derivative"
    ):
        H @ random(26)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    reverse = HessianOperator(model, nn.MSELoss(), small()[1])
    assert error(reverse @ random(26), hessian(None) @ random(26)) < 1e-12


class WrongTangent(torch.autograd.Function):
    """A square whose forward rule is wrong."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * t


def test_a_forward_rule_that_contradicts_the_backward_one_is_warned_about_once() -> None:
    H = hessian(ForwardOverReverse(), lambda out, y: (WrongTangent.apply(out) - y).square().mean())
    v = random(26)
    with pytest.warns(UserWarning, match="ForwardOverReverse and ReverseOverReverse differ by"):
        H @ v
    H @ v


# -- functions whose authors rule out a second derivative --------------------------------------------


def cube(x: Tensor) -> Tensor:
    return x**3


ONCE: dict[str, Any] = {
    "before a curved loss": lambda f: lambda out, y: (f(out) - y).square().mean(),
    "before a linear loss": lambda f: lambda out, y: (f(out) - y).mean(),
    "after the mean": lambda f: lambda out, y: f(out.mean()),
}


@pytest.mark.parametrize("strategy", [None, ReverseOverReverse()], ids=repr)
@pytest.mark.parametrize("where", ONCE)
def test_once_differentiable_functions_are_refused(where: str, strategy: Any) -> None:
    H = hessian(strategy, ONCE[where](CubeOnce.apply))
    message = "once_differentiable, so its second derivative is not defined; strategy=FiniteDiff"
    for operator in (H, H.linearize()):
        with pytest.raises(NoSecondDerivativeError, match=message):
            operator @ random(26)


@pytest.mark.parametrize("where", ONCE)
def test_finite_differences_of_them_are_given_on_request(where: str) -> None:
    v = random(26)
    found = hessian(FiniteDifference(), ONCE[where](CubeOnce.apply)) @ v
    assert error(found, hessian(None, ONCE[where](cube)) @ v) < 1e-6
