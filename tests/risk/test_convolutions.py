"""Rewritten convolutions: torch's values and derivatives, of every order and in every mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import HessianOperator
from hvpop.risk.formulas import convolutions
from hvpop.risk.formulas.convolutions import CONVOLUTIONS, SMALL
from hvpop.risk.rewrites import Rewrites

Op = Callable[..., Tensor]
DIRECT = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
SHAPE = (7, 6, 5)
ROUNDING = 1e-13

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(convolutions, "SMALL", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _geometries() -> Iterator[tuple[int, ...]]:
    """Axes, groups, stride, padding, dilation, kernel: each value with each other one."""
    values = itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3), (0, 1), (1, 2), (1, 2, 3))
    for i, (axes, groups, stride, padding, dilation, kernel) in enumerate(values):
        if i % 5 == 0 and (kernel, groups) != (1, 1):  # torch's own way, see below
            yield axes, groups, stride, padding, dilation, kernel


GEOMETRIES = list(_geometries())


def derivatives(
    op: Op, inputs: Sequence[Tensor], mode: Callable[[], AbstractContextManager[Any]]
) -> list[Tensor]:
    """The gradient of a curved function of op, its products in each mode, and a third derivative."""
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
    xs = [x.clone().requires_grad_() for x in inputs]
    with mode():
        value = op(*xs)
    gradient = torch.autograd.grad(value.sin().sum(), xs, create_graph=True)
    product = torch.autograd.grad(gradient, xs, vectors, create_graph=True)
    third = torch.autograd.grad(product, xs, vectors, retain_graph=True)
    columns = [torch.stack([v, -2 * v]) for v in vectors]
    batched = torch.autograd.grad(gradient, xs, columns, retain_graph=True, is_grads_batched=True)
    alone = torch.autograd.grad(gradient, xs, vectors)
    with fwd.dual_level():
        duals = [
            fwd.make_dual(x.clone().requires_grad_(), v)
            for x, v in zip(inputs, vectors, strict=True)
        ]
        with mode():
            loss = op(*duals).sin().sum()
        along = torch.autograd.grad(loss, duals, create_graph=True)
        tangents = [fwd.unpack_dual(g).tangent for g in along]
    return [value, *gradient, *product, *alone, *batched, *tangents, *third]


def compare(op: Op, inputs: Sequence[Tensor]) -> None:
    seen: set[str] = set()
    ours = derivatives(op, inputs, lambda: Rewrites(seen))
    assert len(seen) == 1
    theirs = derivatives(op, inputs, nullcontext)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).detach().abs().max() <= ROUNDING * (1 + b.detach().abs().max())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_derivatives_of_a_convolution(geometry: tuple[int, ...]) -> None:
    axes, groups, stride, padding, dilation, kernel = geometry
    inputs = [randn(2, 4, *SHAPE[:axes]), randn(8, 4 // groups, *[kernel] * axes), randn(8)]
    compare(lambda x, w, b: DIRECT[axes - 1](x, w, b, stride, padding, dilation, groups), inputs)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_derivatives_of_a_transposed_convolution(geometry: tuple[int, ...]) -> None:
    axes, groups, stride, padding, dilation, kernel = geometry
    inputs = [randn(2, 4, *SHAPE[:axes]), randn(4, 8 // groups, *[kernel] * axes), randn(8)]
    compare(
        lambda x, w, b: TRANSPOSED[axes - 1](x, w, b, stride, padding, 0, groups, dilation),
        inputs,
    )


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (lambda x, w: F.conv2d(x, w, stride=(1, 2), padding=(2, 0)), [(2, 3, 6, 7), (4, 3, 3, 2)]),
        (lambda x, w: F.conv2d(x, w, stride=[2], padding=[1]), [(2, 3, 6, 7), (4, 3, 3, 2)]),
        (
            lambda x, w: F.conv2d(x, w, padding="same", dilation=(1, 2)),
            [(2, 3, 6, 7), (4, 3, 3, 5)],
        ),
        (lambda x, w: F.conv1d(x, w, padding="valid"), [(2, 3, 7), (4, 3, 3)]),
        (lambda x: F.conv2d(x, torch.ones(4, 1, 3, 3).double(), groups=2), [(2, 2, 6, 7)]),
        (lambda w: F.conv1d(torch.ones(3, 2, 9).double(), w), [(4, 2, 3)]),
    ],
    ids=["uneven", "lists", "same", "valid", "input alone", "weight alone"],
)
def test_derivatives_with_other_arguments(op: Op, shapes: list[tuple[int, ...]]) -> None:
    compare(op, [randn(*shape) for shape in shapes])


def test_the_rows_left_over_by_a_transposed_convolution_have_a_third_derivative() -> None:
    """torch raises there; the second one agrees, and the third one with differences of it."""

    def op(x: Tensor, w: Tensor) -> Tensor:
        return F.conv_transpose1d(x, w, stride=2, output_padding=1)

    point, v = [randn(2, 3, 5), randn(3, 4, 3)], [randn(2, 3, 5), randn(3, 4, 3)]

    def product(t: float, mode: Any, create_graph: bool = False) -> Any:
        xs = [(x + t * u).requires_grad_() for x, u in zip(point, v, strict=True)]
        with mode():
            loss = op(*xs).sin().sum()
        gradient = torch.autograd.grad(loss, xs, create_graph=True)
        return torch.autograd.grad(gradient, xs, v, create_graph=create_graph), xs

    for a, b in zip(product(0, Rewrites)[0], product(0, nullcontext)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)
    ours, xs = product(0, Rewrites, create_graph=True)
    third = torch.autograd.grad(ours, xs, v)
    h = 1e-3
    near, far = (
        [
            a - b
            for a, b in zip(product(t, nullcontext)[0], product(-t, nullcontext)[0], strict=True)
        ]
        for t in (h, 2 * h)
    )
    for ours_, n, f in zip(third, near, far, strict=True):
        torch.testing.assert_close(ours_, (8 * n - f) / (12 * h), rtol=1e-7, atol=1e-7)


def grouped(w: Tensor) -> Tensor:
    return F.conv2d(torch.ones(2, 4, 6, 6).double(), w, groups=2).sin().sum()


FUNCTORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": torch.func.grad(grouped),
    "jvp": lambda w: torch.func.jvp(grouped, (w,), (w.cos(),))[1],
    "jvp of grad": lambda w: torch.func.jvp(torch.func.grad(grouped), (w,), (w.cos(),))[1],
    "hessian": torch.func.hessian(grouped),
    "vmap": lambda w: torch.func.vmap(torch.func.grad(grouped))(torch.stack([w, w.cos()])),
}


@pytest.mark.parametrize("name", FUNCTORCH)
def test_models_may_use_functorch_themselves(name: str) -> None:
    w = randn(4, 2, 3, 3)
    expected = FUNCTORCH[name](w)
    seen: set[str] = set()
    with Rewrites(seen):
        result = FUNCTORCH[name](w)
    assert seen == {"conv2d"}
    torch.testing.assert_close(result, expected, rtol=ROUNDING, atol=ROUNDING)


LEFT_TO_TORCH: dict[str, Callable[[], Tensor]] = {
    "one pixel": lambda: F.conv2d(randn(2, 3, 5, 5), randn(4, 3, 1, 1)),
    "one sample": lambda: F.conv2d(randn(3, 5, 5), randn(4, 3, 3, 3)),
    "no sample": lambda: F.conv2d(randn(0, 4, 5, 5), randn(4, 2, 3, 3), groups=2),
    "padding on one side": lambda: F.conv2d(randn(2, 3, 5, 5), randn(4, 3, 2, 2), padding="same"),
    "complex": lambda: F.conv1d(randn(2, 3, 5) * 1j, randn(4, 3, 3) * 1j),
    "more rows than steps": lambda: F.conv_transpose1d(
        randn(2, 3, 5), randn(3, 4, 3), output_padding=1, dilation=2
    ),
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_what_gains_nothing_is_left_to_torch(name: str) -> None:
    seen: set[str] = set()
    with Rewrites(seen):
        torch.manual_seed(0)
        result = LEFT_TO_TORCH[name]()
    torch.manual_seed(0)
    assert torch.equal(result, LEFT_TO_TORCH[name]())
    assert seen == set()


def test_autocast_decides_the_precision_as_ever() -> None:
    x, w = torch.ones(2, 4, 6, 6), torch.ones(4, 1, 3, 3)
    seen: set[str] = set()
    with torch.autocast("cpu", torch.bfloat16), Rewrites(seen):
        assert F.conv2d(x, w, groups=4).dtype == torch.bfloat16
    assert seen == set()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.conv2d(randn(2, 3, 5, 5), randn(4, 2, 3, 3)), "expected input"),
        (lambda: F.conv2d(randn(2, 4, 5, 5), randn(4, 2, 3, 3), groups=4), "expected input"),
        (lambda: F.conv2d(randn(2, 3, 5, 5), randn(4, 3, 9, 9)), "Kernel size"),
        (lambda: F.conv2d(randn(2, 3, 5, 5), randn(4, 3, 3, 3), stride=0), "stride"),
        (lambda: F.conv2d(randn(2, 3, 5, 5), randn(4, 3, 3, 3), padding="some"), "padding"),
        (lambda: F.conv1d(randn(2, 3, 5), randn(4, 3, 3).float()), "[Tt]ype"),
        (lambda: F.conv1d(randn(2, 3, 5), randn(4, 3, 3), randn(5)), "size"),
        (lambda: F.conv1d(randn(2, 3, 5), randn(4, 3, 3), randn(1)), "size"),
        (lambda: F.conv1d(randn(2, 3, 5), randn(1, 3, 3), randn(5)), "size"),
        (lambda: F.conv1d(randn(2, 3, 5), randn(4, 3, 3), randn(2, 2)), "bias"),
        (lambda: F.conv1d(randn(2, 3, 5, 5), randn(4, 3, 3, 3)), "2D .* or 3D"),
        (lambda: F.conv2d(randn(2, 3, 5), randn(4, 3, 3)), "weight|dim"),
        (lambda: F.conv_transpose2d(randn(2, 3, 5, 5), randn(3)), "weight|dim|size"),
    ],
)
def test_invalid_arguments_get_the_message_of_torch(call: Op, message: str) -> None:
    with pytest.raises(Exception, match=message) as theirs:
        call()
    with Rewrites(), pytest.raises(type(theirs.value), match=message):
        call()


def test_only_large_or_grouped_ones_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "SMALL", SMALL)
    seen: set[str] = set()
    with Rewrites(seen):
        F.conv2d(randn(2, 3, 8, 8), randn(4, 3, 3, 3))
        assert seen == set()
        F.conv1d(randn(2, 4, 8), randn(4, 1, 3), groups=4)
        F.conv2d(randn(32, 16, 40, 40), randn(16, 16, 3, 3))
    assert seen == {"conv1d", "conv2d"}


@pytest.mark.parametrize(
    ("places", "channels", "on_gpu", "pays"),
    [
        (2**13, 16, False, True),  # 2**13 * 16 * 16 * 9 = 2**24.2
        (2**12, 16, False, False),
        (2**16, 1, True, True),
        (2**15, 512, True, False),
    ],
)
def test_what_is_large_depends_on_the_device(
    monkeypatch: pytest.MonkeyPatch, places: int, channels: int, on_gpu: bool, pays: bool
) -> None:
    monkeypatch.setattr(convolutions, "SMALL", SMALL)
    weight = torch.Size((channels, channels, 3, 3))
    assert convolutions._pays(places, weight, 1, on_gpu=on_gpu) is pays


def test_shapes_can_be_found_without_numbers() -> None:
    seen: set[str] = set()
    with torch.device("meta"), Rewrites(seen):
        result = F.conv2d(torch.ones(2, 4, 6, 6), torch.ones(8, 2, 3, 3), groups=2, stride=2)
    assert seen == {"conv2d"}
    assert result.shape == (2, 8, 2, 2)


def test_every_kind_is_in_the_table() -> None:
    assert set(CONVOLUTIONS) == {*DIRECT, *TRANSPOSED}


def test_a_pass_makes_the_convolutions_that_it_asks_for_and_no_others() -> None:
    """A pull-back's transpose is asked for its cotangent, though its graph leads to the weights, too."""
    x, w, v = (
        randn(4, 2, 6, 6).requires_grad_(),
        randn(3, 2, 3, 3).requires_grad_(),
        randn(3, 2, 3, 3),
    )
    with Rewrites():
        z = F.conv2d(x.sin(), w)
    u = torch.ones_like(z).requires_grad_()
    (pulled,) = torch.autograd.grad(z, w, u, create_graph=True)
    with torch.profiler.profile() as seen:
        (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
    calls = [event.name for event in seen.events()]
    assert calls.count("aten::_convolution") == 1
    assert calls.count("aten::convolution_backward") == 0
    torch.testing.assert_close(pushed, F.conv2d(x.sin(), v), rtol=ROUNDING, atol=ROUNDING)
    both = torch.autograd.grad(pulled, (u, x), v)
    assert all(bool(t.any()) for t in both)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operators_of_ordinary_layers_use_them(memory_format: Any) -> None:
    """Layers that need no policies meet the rewrites too: the graph says so."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    model = model.to(memory_format=memory_format)
    batch = (randn(5, 2, 6, 6).to(memory_format=memory_format), torch.randint(3, (5,)))
    H = HessianOperator(model, nn.CrossEntropyLoss(), [batch])
    v = randn(H.shape[0])
    product = H @ v
    loss = H.risk.loss(H.risk.parameters(), {}, batch, None)
    names, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        names.add(type(node).__name__)
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    assert "PartialDerivativeBackward" in names
    parameters = list(model.parameters())
    plain = nn.CrossEntropyLoss()(model(batch[0]), batch[1])
    gradient = torch.autograd.grad(plain, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    expected = torch.autograd.grad(flat, parameters, v)
    torch.testing.assert_close(product, torch.cat([e.reshape(-1) for e in expected]))
