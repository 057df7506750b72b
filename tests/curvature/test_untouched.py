"""Nothing of the user's changes, whatever the model does and however a product ends."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvpop import FiniteDifference, ForwardOverReverse, HessianOperator, ReverseOverReverse
from tests.zoo.registry import Problem
from tests.zoo.untouched import same, seen_of_module, seen_of_the_user

from .problems import classes, error, mlp, random, regression, set_parameters, split

TIGHT = 1e-12
DATA = split(regression(), (10, 10, 3))
STRATEGIES = [None, ReverseOverReverse(), ForwardOverReverse(), FiniteDifference()]


class Everything(nn.Module):
    """Layers that change something in a forward pass, or need something changed around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)
        self.tied = self.first
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.latest: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.dropout(self.norm(self.tied(torch.tanh(self.first(x)))))
        self.latest = h
        h = checkpoint(lambda z: torch.tanh(z), h, use_reentrant=False)
        return self.last(self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0])


def everything() -> nn.Module:
    model = set_parameters(Everything().double())
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.25) if i % 2 else None
    return model


def seen(model: nn.Module, data: Any = DATA) -> dict[str, Any]:
    record = seen_of_the_user(Problem(model, data, nn.MSELoss()))
    latest = getattr(model, "latest", None)
    return record | {"latest": None if latest is None else id(latest)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, value in before.items() if not same(value, after[name])]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_products_leave_everything_as_it_was(training: bool, strategy: Any) -> None:
    model = everything().train(training)
    before = seen(model)
    H = HessianOperator(model, nn.MSELoss(), DATA, strategy=strategy)
    v, V = random(H.shape[1]), random(H.shape[1], 2)
    H @ v
    H @ V
    for memory in (0, None):
        A = H.linearize(memory=memory)
        A @ v
        A @ V
        A.is_current()
        A.report()
    assert changed(before, seen(model)) == []


@pytest.mark.parametrize("mode", ["batch", "full"])
@pytest.mark.parametrize("where", ["first", "second", "loss"])
def test_an_exception_leaves_everything_as_it_was(where: str, mode: Any) -> None:
    class Breaking(nn.MSELoss):
        calls = 0

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            Breaking.calls += 1
            if where == "loss" or Breaking.calls >= {"first": 1, "second": 2}[where]:
                raise KeyError("in the user's code")
            return super().forward(out, y)

    model = everything()
    H = HessianOperator(model, Breaking(), DATA, mode=mode)
    before = seen(model)
    for operator in (H, H.linearize()):
        Breaking.calls = 0
        with pytest.raises(KeyError, match="in the user's code"):
            operator @ random(H.shape[1])
    assert changed(before, seen(model)) == []


@pytest.mark.filterwarnings("ignore:batches are weighted by")  # they see each other
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_a_failing_backward_pass_leaves_everything_as_it_was(strategy: Any) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise KeyError("in the user's code")

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            raise KeyError("in the user's code")

    model = everything()
    H = HessianOperator(
        model, lambda out, y: (Failing.apply(out) - y).square().mean(), DATA, strategy=strategy
    )
    before = seen(model)
    for operator in (H, H.linearize(), H.linearize(memory=0)):
        with pytest.raises(KeyError, match="in the user's code"):
            operator @ random(H.shape[1])
    assert changed(before, seen(model)) == []


def test_an_interrupt_leaves_everything_as_it_was() -> None:
    class Interrupted(nn.MSELoss):
        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = everything()
    H = HessianOperator(model, Interrupted(), DATA)
    before = seen(model)
    with pytest.raises(KeyboardInterrupt):
        H @ random(H.shape[1])
    assert changed(before, seen(model)) == []


CALLERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: _Flag(torch.use_deterministic_algorithms, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
    "default dtype": lambda: _Flag(torch.set_default_dtype, torch.float32, torch.float64),
}


class _Flag(AbstractContextManager[None]):
    def __init__(self, setter: Callable[[Any], None], off: Any, on: Any = True) -> None:
        self.setter, self.on, self.off = setter, on, off

    def __enter__(self) -> None:
        self.setter(self.on)

    def __exit__(self, *exception: object) -> None:
        self.setter(self.off)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("caller", CALLERS)
def test_the_modes_of_the_caller_make_no_difference(caller: str, strategy: Any) -> None:
    def build(dtype: torch.dtype) -> tuple[HessianOperator, Tensor]:
        model, data = mlp(dtype=dtype), [(x.to(dtype), y.to(dtype)) for x, y in DATA]
        H = HessianOperator(model, nn.MSELoss(), data, strategy=strategy)
        return H, random(H.shape[1], 2).to(dtype)

    for dtype in (torch.float64, torch.float32):
        H, V = build(dtype)
        expected = H @ V
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anomaly mode warns of its cost
            with CALLERS[caller]():
                flags = seen(nn.Identity(), [])
                live, linearized = H @ V, H.linearize() @ V
                again = H.linearize(memory=0) @ V[:, 0]
                assert changed(flags, seen(nn.Identity(), [])) == []
        single = dtype is torch.float32
        if isinstance(strategy, FiniteDifference):  # joined batches round differently
            tolerance = 1e-2 if single else 1e-7
        else:
            tolerance = 1e-5 if single else 1e-12  # rounding; autocast would make it 1e-2
        assert error(live, expected) < tolerance
        assert error(linearized, expected) < tolerance
        assert error(again, expected[:, 0]) < tolerance


def test_models_made_under_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        made = mlp()
        data = [(x.clone(), y.clone()) for x, y in DATA]
        v = random(43)
        H = HessianOperator(made, nn.MSELoss(), data)
        inside = H @ v
    expected = HessianOperator(mlp(), nn.MSELoss(), DATA) @ v
    assert error(inside.clone(), expected) < TIGHT
    assert error(H @ v, expected) < TIGHT
    assert error(H.linearize() @ v, expected) < TIGHT
    assert not (H @ v).requires_grad


def test_a_product_is_a_tensor_of_its_own() -> None:
    """Neither the operand nor a part of the model, and writable, even where it is a constant."""
    model = mlp()
    H = HessianOperator(model, lambda out, y: model[0].bias.sum() ** 2 + 0 * out.sum(), DATA)
    for operator in (H, H.linearize()):
        v = random(H.shape[1])
        kept = v.clone()
        product = operator @ v
        product += 1
        product.mul_(2)
        assert torch.equal(v, kept)
        assert error(operator @ v, H @ v) < TIGHT


@pytest.mark.parametrize("shared", [True, False])
def test_threads_do_not_disturb_each_other(shared: bool) -> None:
    model = mlp()
    strategies = [None, ForwardOverReverse(), FiniteDifference()]
    one = HessianOperator(model, nn.MSELoss(), DATA)
    operators = [
        one if shared else HessianOperator(model, nn.MSELoss(), DATA, strategy=strategy)
        for strategy in strategies
    ]
    v = random(one.shape[1])
    expected, before = one @ v, seen(model)
    errors: list[Any] = []

    def work(operator: HessianOperator) -> None:
        try:
            errors.extend(error(operator @ v, expected) for _ in range(10))
            errors.append(error(operator.linearize() @ v, expected))
        except Exception as failure:
            errors.append(failure)

    threads = [threading.Thread(target=work, args=(operator,)) for operator in operators * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e for e in errors if not isinstance(e, float) or e > 1e-6] == []
    assert len(errors) == 66
    assert changed(before, seen(model)) == []


def test_hooks_of_the_user_run_and_stay() -> None:
    model, calls = mlp(), []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(output))
    before = seen_of_module(model[0])["hooks"]
    H = HessianOperator(model, nn.CrossEntropyLoss(), [(random(4, 4), classes(4))])
    H @ random(H.shape[1])
    assert len(calls) > 0
    assert all(type(call) is Tensor for call in calls)
    assert seen_of_module(model[0])["hooks"] == before


def test_buffers_made_in_a_forward_pass_are_not_left_behind() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.mask = mlp(), None

        def forward(self, x: Tensor) -> Tensor:
            if self.mask is None:
                self.mask = torch.ones(x.shape[1], dtype=x.dtype)
                self.register_buffer("kept_mask", self.mask)
            return self.net(x * self.mask)

    model = Lazy()
    H = HessianOperator(model, nn.MSELoss(), DATA)
    v = random(H.shape[1])
    assert error(H @ v, HessianOperator(mlp(), nn.MSELoss(), DATA) @ v) < TIGHT
    assert list(model.buffers()) == []
    assert model.mask is None


def test_layers_with_a_patched_forward_get_the_patch() -> None:
    model = mlp()
    model[0].forward = lambda x: nn.functional.dropout(
        nn.functional.linear(x, model[0].weight, model[0].bias)
    )
    H = HessianOperator(model, nn.CrossEntropyLoss(), [(random(9, 4), classes(9))])
    v = random(H.shape[1])
    assert torch.equal(H @ v, H @ v)
