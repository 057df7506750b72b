"""A name of torch's that is gone, or that torch no longer calls, is an error or makes no difference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hvpop import Compiled, HessianOperator, _torch
from hvpop.risk import canaries, policies
from hvpop.strategies.graphs import why_missing
from tests.functions import CubeOnce

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).sin()
Y = X.flip(0)[:, :2].cos()


class Net(nn.Module):
    """Two layers, the first one through ``around``."""

    def __init__(self, around: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.around(self, x))
        return result


def plainly(net: Net, x: Tensor) -> Tensor:
    return torch.tanh(net.first(x))


def checkpointed(net: Net, x: Tensor, reentrant: bool = False) -> Tensor:
    run: Any = checkpoint
    result: Tensor = run(lambda x: plainly(net, x), x, use_reentrant=reentrant)
    return result


class Again(torch.autograd.Function):
    """Evaluates in backward what it has been given, with tensors that it holds."""

    @staticmethod
    def forward(ctx: Any, run: Any, held: Any, x: Tensor, *parameters: Tensor) -> Any:
        ctx.run, ctx.held, ctx.x = run, held, x
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        return None, None, *torch.autograd.grad(y, (x, *ctx.held), g)


def holding(net: Net) -> Callable[..., Tensor]:
    held = [net.first.weight, net.first.bias]

    def again(net: Net, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, held[0], held[1]))

        result: Tensor = Again.apply(run, held, x, *net.first.parameters())
        return result

    return again


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2


EARLY = Halved.apply
"""Looked up before it is replaced."""


def halving(apply: Callable[[Tensor], Tensor]) -> Callable[[Net], Callable[..., Tensor]]:
    def make(net: Net) -> Callable[..., Tensor]:
        weight = net.first.weight

        def around(net: Net, x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, 2 * apply(weight), net.first.bias))

        return around

    return make


def transformed(net: Net) -> Callable[..., Tensor]:
    weight = net.first.weight

    def around(net: Net, x: Tensor) -> Tensor:
        def half_square(w: Tensor) -> Tensor:
            return w.square().sum() / 2

        same = torch.func.grad(half_square)(weight)  # the weight itself
        return torch.tanh(F.linear(x, same, net.first.bias))

    return around


def always(around: Callable[..., Tensor]) -> Callable[[Net], Callable[..., Tensor]]:
    return lambda net: around


NEEDED: dict[str, list[Callable[[Net], Callable[..., Tensor]]]] = {
    "checkpoint._checkpoint_without_reentrant_generator": [always(checkpointed)],
    "checkpoint._checkpoint_without_reentrant_generator_impl": [always(checkpointed)],
    "CheckpointFunction.apply": [always(lambda net, x: checkpointed(net, x, reentrant=True))],
    "Function.apply": [halving(EARLY), halving(lambda x: Halved.apply(x))],
    "utils.unwrap_dead_wrappers": [halving(EARLY), halving(lambda x: Halved.apply(x))],
    "eager_transforms._wrap_for_grad": [transformed],
    "BackwardCFunction.apply": [holding],
    "saved_tensors_hooks.__enter__": [always(checkpointed), holding],
}
"""A name that is replaced, and models that need that."""


def product(make: Callable[[Net], Callable[..., Tensor]], moved: bool) -> Tensor:
    """``H v`` at parameters that are not the model's any more if ``moved``."""
    net = Net(plainly)
    net.around = make(net)
    H = HessianOperator(net, nn.MSELoss(), [(X, Y)])
    v = torch.linspace(-1, 1, H.shape[0], dtype=torch.float64).cos()
    if moved:
        H = H.linearize()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.5)
    result: Tensor = H @ v
    return result


@pytest.fixture
def _tried_anew() -> Iterator[None]:
    canaries.broken.cache_clear()
    yield
    canaries.broken.cache_clear()


@pytest.mark.usefixtures("_tried_anew")
@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.*FiniteDifference")
@pytest.mark.parametrize("moved", [False, True], ids=["live", "moved"])
@pytest.mark.parametrize(
    ("name", "make"), [(name, make) for name, makes in NEEDED.items() for make in makes]
)
def test_a_name_that_torch_no_longer_calls_gives_no_wrong_number(
    name: str, make: Any, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = product(always(plainly), moved)
    right_or_refused(make, moved, expected)
    canaries.broken.cache_clear()
    patch = policies._Patches._patch

    def renamed(self: Any, owner: Any, attribute: str, replacement: Any) -> None:
        if f"{owner.__name__.rpartition('.')[2]}.{attribute}" == name:
            attribute += "_as_it_was_once_called"
        patch(self, owner, attribute, replacement)

    monkeypatch.setattr(policies._Patches, "_patch", renamed)
    right_or_refused(make, moved, expected)


def right_or_refused(make: Any, moved: bool, expected: Tensor) -> None:
    said, found = "", expected
    try:
        found = product(make, moved)
    except RuntimeError as error:
        said = str(error)
    assert not said or "hvpop evaluates such models by replacing" in said or "holds on" in said
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*FiniteDifference")
@pytest.mark.parametrize(
    ("make", "moved"),
    [(make, moved) for makes in NEEDED.values() for make in makes for moved in (False, True)],
)
def test_nothing_is_refused_but_what_was_looked_up_before_in_c(make: Any, moved: bool) -> None:
    looked_up = make.__closure__ is not None and EARLY in (
        c.cell_contents for c in make.__closure__
    )
    in_c = type(EARLY).__name__ == "builtin_function_or_method"  # since torch 2.14
    expected = product(always(plainly), moved)
    if looked_up and in_c and moved:
        with pytest.raises(RuntimeError, match="holds on to parameters"):
            product(make, moved)
    else:
        torch.testing.assert_close(product(make, moved), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("_tried_anew")
@pytest.mark.parametrize(
    "name",
    ["BackwardCFunction.apply", "saved_tensors_hooks.__enter__", "CheckpointFunction.apply"],
)
def test_a_canary_tells_of_a_patch_that_does_not_take(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert canaries.broken() == ()
    canaries.broken.cache_clear()
    owner, attribute = name.split(".")
    patch = policies._Patches._patch

    def renamed(self: Any, to: Any, at: str, replacement: Any) -> None:
        if (to.__name__.rpartition(".")[2], at) != (owner, attribute):
            patch(self, to, at, replacement)

    monkeypatch.setattr(policies._Patches, "_patch", renamed)
    assert [found.endswith(name) for found, _ in canaries.broken()] == [True]
    with pytest.raises(RuntimeError, match=f"replacing .*{name}, which torch"):
        product(holding, moved=False)


def test_what_torch_does_not_have_is_said_at_once() -> None:
    with pytest.raises(ImportError, match=r"needs torch\._C\._gone to see it; torch .* install"):
        _torch._private("torch._C._gone", "to see it")
    with pytest.raises(ImportError, match=r"torch\.nowhere\.name"):
        _torch._private("torch.nowhere.name", "to see it")


def test_without_a_tracer_the_wrapped_strategy_serves_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone() -> Any:
        return _torch._private(
            "torch.fx.experimental.proxy_tensor.make_fx_gone", "to trace products"
        )

    monkeypatch.setattr(_torch, "make_fx", gone)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    data = [(X, Y)]
    v = torch.ones(8, dtype=torch.float64)
    expected = HessianOperator(net, nn.MSELoss(), data) @ v
    H = HessianOperator(net, nn.MSELoss(), data, strategy=Compiled(compiler=False))
    with pytest.warns(UserWarning, match=r"make_fx_gone to trace products; torch .* has nothing"):
        found = H @ v
    torch.testing.assert_close(found, expected)


def test_a_function_without_the_name_of_its_class_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"object\._forward_cls to see whether"):
        _torch.function_of(object())


def test_a_torch_that_nobody_has_tested_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "3.1.0+cpu")
    _torch.say_if_newer.cache_clear()
    with pytest.warns(UserWarning, match=r"torch 3\.1\.0\+cpu is newer than"):
        product(always(plainly), moved=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product(always(plainly), moved=False)
    _torch.say_if_newer.cache_clear()


# --- the words of torch's errors ----------------------------------------------------------------------


def twice(op: Callable[[Tensor], Tensor]) -> None:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()


def dual(op: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        twice(lambda x: op(forward_ad.make_dual(x, X)))


def nested_levels() -> None:
    with forward_ad.dual_level(), forward_ad.dual_level():
        pass


ERRORS: dict[str, Callable[[], None]] = {
    "the op hardsigmoid_backward has no double backward": lambda: twice(F.hardsigmoid),
    "the op zeta has no derivative": lambda: twice(lambda x: torch.special.zeta(x, x)),
    "the op multi_margin_loss has no forward-mode derivative": lambda: dual(
        lambda x: F.multi_margin_loss(x, torch.tensor([0, 1, 2, 0]))
    ),
    "the model uses forward mode itself": nested_levels,
    "a custom autograd.Function has no jvp": lambda: dual(without_jvp),
    "a custom autograd.Function is once_differentiable": lambda: twice(CubeOnce.apply),
}


def without_jvp(x: Tensor) -> Tensor:
    result: Tensor = Halved.apply(x)
    return result


@pytest.mark.parametrize("words", ERRORS)
def test_the_words_of_torchs_errors_are_understood(words: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ERRORS[words]()
    assert words in str(why_missing(caught.value))
