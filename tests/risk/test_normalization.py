"""Formulas of layer norms: torch's values and derivatives of three orders, and where torch's way is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from hvpop import HessianOperator
from hvpop.risk.formulas import normalization
from hvpop.risk.formulas.normalization import SMALL, layer_norm
from hvpop.strategies import Compiled, HVPStrategy, ReverseOverReverse

EPS = torch.finfo(torch.float64).eps
ROWS, WIDTH = 5, 7

Op = Callable[..., Tensor]


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "SMALL", 0)


def arguments(scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, 3, WIDTH), (WIDTH,), (WIDTH,)
    x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.requires_grad_() for t in (1 + scale * x, w, b)]


def directions(tensors: list[Tensor], *more: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*more, *t.shape, generator=generator, dtype=t.dtype) for t in tensors]


def gradient(op: Op, tensors: list[Tensor], by: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    value = op(tensors[0], (WIDTH,), *tensors[1:], eps=1e-3).sin().sum()
    return torch.autograd.grad(value, by or tensors, create_graph=True)


def assert_equal(found: Any, expected: Any) -> None:
    terms = ROWS * 3 * WIDTH  # that are added up, at most, in another order, a few times over
    scale = max(float(t.detach().abs().max()) for t in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).detach().abs().max()) <= 4 * terms * EPS * scale


@pytest.mark.parametrize("scale", [1.0, 1e-2])  # the second's variance is below eps
def test_a_product_is_torchs(every_size: None, scale: float) -> None:
    tensors = arguments(scale)
    v = directions(tensors)
    ours, theirs = (
        torch.autograd.grad(gradient(op, tensors), tensors, v) for op in (layer_norm, F.layer_norm)
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("left_out", range(3))
def test_a_product_by_some_of_its_tensors_is_torchs(every_size: None, left_out: int) -> None:
    tensors = arguments()
    by = [t for i, t in enumerate(tensors) if i != left_out]
    tensors[left_out].requires_grad_(False)
    v = directions(by)
    ours, theirs = (
        torch.autograd.grad(gradient(op, tensors, by), by, v) for op in (layer_norm, F.layer_norm)
    )
    assert_equal(ours, theirs)


def test_a_product_along_some_of_its_gradients_is_torchs(every_size: None) -> None:
    tensors = arguments()
    for i, v in enumerate(directions(tensors)):
        ours, theirs = (
            torch.autograd.grad(gradient(op, tensors)[i], tensors, v, allow_unused=True)
            for op in (layer_norm, F.layer_norm)
        )
        for one, other in zip(ours, theirs, strict=True):
            other = torch.zeros_like(v) if other is None else other
            assert_equal([torch.zeros_like(other) if one is None else one], [other])


def test_derivatives_of_three_orders_are_torchs(every_size: None) -> None:
    tensors = arguments()
    v = directions(tensors)
    found = []
    for op in (layer_norm, F.layer_norm):
        first = gradient(op, tensors)
        second = torch.autograd.grad(first, tensors, v, create_graph=True)
        third = torch.autograd.grad(second, tensors, v)
        found.append([*first, *second, *third])
    assert_equal(*found)


def test_columns_go_through_it_together(every_size: None) -> None:
    tensors = arguments()
    slope = gradient(layer_norm, tensors)
    V = directions(tensors, 3)
    together = torch.autograd.grad(slope, tensors, V, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(slope, tensors, [v[i] for v in V], retain_graph=True)
        assert_equal([t[i] for t in together], one)


def test_batches_can_be_vectorized_over(every_size: None) -> None:
    x, w, b = (t.detach() for t in arguments())
    found = torch.vmap(lambda one: layer_norm(one, (WIDTH,), w, b))(torch.stack([x, 2 * x]))
    assert_equal(found, torch.stack([F.layer_norm(t, (WIDTH,), w, b) for t in (x, 2 * x)]))


def test_other_kinds_are_left_to_torch() -> None:
    x, w, b = (t.detach() for t in arguments())
    assert layer_norm(x, (WIDTH,), w, b) is None  # small
    x = x.repeat(SMALL // x.numel() + 1, 1, 1)
    assert layer_norm(x, (WIDTH,), w, b) is not None
    assert layer_norm(x, (WIDTH,)) is None
    assert layer_norm(x, (WIDTH,), w) is None
    assert layer_norm(x, (WIDTH,), None, b) is None
    assert layer_norm(x, (WIDTH,), w.float(), b) is None
    for wrong in ((x, (3, WIDTH), w, b), (x, (WIDTH,), w[None], b), (x, (WIDTH,), w, b[None])):
        assert layer_norm(*wrong) is None  # torch says what is wrong
    with torch.autocast("cpu"):
        assert layer_norm(x, (WIDTH,), w, b) is None
    with forward_ad.dual_level():
        assert layer_norm(x, (WIDTH,), w, b) is None


@pytest.mark.parametrize(
    "strategy", [ReverseOverReverse(), Compiled(compiler=False)], ids=["kept", "traced"]
)
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_a_network_of_them_has_torchs_matrix(
    every_size: None, monkeypatch: pytest.MonkeyPatch, strategy: HVPStrategy, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    hidden = (nn.Unflatten(1, shape), nn.LayerNorm(shape), nn.Flatten(), nn.Tanh())
    model = nn.Sequential(nn.Linear(4, 6), *hidden, nn.Linear(6, 6), *hidden, nn.Linear(6, 3))
    for p in model.parameters():
        nn.init.normal_(p)
    data = [(torch.randn(8, 4).double(), torch.randint(3, (8,)))]
    H = HessianOperator(model.double(), nn.CrossEntropyLoss(), data, strategy=strategy)
    identity = torch.eye(H.shape[1], dtype=torch.float64)
    found = H.linearize() @ identity
    monkeypatch.setattr(normalization, "SMALL", 2**62)
    plain = HessianOperator(model, nn.CrossEntropyLoss(), data, strategy=ReverseOverReverse())
    expected = plain @ identity
    assert float((found - expected).abs().max()) <= H.shape[0] * EPS * float(expected.abs().max())
