"""Formulas of LSTM layers: torch's values and derivatives of three orders, and where torch's way is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence

from hvpop import HessianOperator
from hvpop.risk.formulas.lstm import lstm

EPS = torch.finfo(torch.float64).eps
STEPS, BATCH, INTO, WIDTH = 5, 2, 3, 4


def arguments(
    layers: int = 1, ways: int = 1, bias: bool = True, batch_first: bool = False
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors to differentiate by, and what `nn.LSTM` hands ``torch.lstm``."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x = made(BATCH, STEPS, INTO) if batch_first else made(STEPS, BATCH, INTO)
    h, c = (made(layers * ways, BATCH, WIDTH) for _ in range(2))
    weights = []
    for layer in range(layers):
        for _ in range(ways):
            into = ways * WIDTH if layer else INTO
            weights += [made(4 * WIDTH, into), made(4 * WIDTH, WIDTH)]
            weights += [made(4 * WIDTH), made(4 * WIDTH)] if bias else []
    return [x, h, c, *weights], (
        x, (h, c), weights, bias, layers, 0.0, True, ways == 2, batch_first
    )  # fmt: skip


def derivatives(op: Any, tensors: list[Tensor], args: tuple[Any, ...]) -> list[list[Tensor]]:
    """Of a function of all three results: value, gradient, a product, and its derivative."""
    out, h, c = op(*args)
    value = out.sin().sum() + h.square().sum() + (c**3).sum()
    found = [[value.detach()]]
    for _ in range(3):
        gradient = torch.autograd.grad(value, tensors, create_graph=True)
        found.append([g.detach() for g in gradient])
        generator = torch.Generator().manual_seed(1)
        v = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]
        value = torch.stack([(g * d).sum() for g, d in zip(gradient, v, strict=True)]).sum()
    return found


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"layers": 2, "batch_first": True},
        {"layers": 2, "ways": 2, "bias": False},
    ],
    ids=str,
)
def test_values_and_derivatives_of_three_orders_are_torchs(kind: dict[str, Any]) -> None:
    tensors, args = arguments(**kind)
    found, expected = derivatives(lstm, tensors, args), derivatives(torch.lstm, tensors, args)
    terms = STEPS * BATCH * WIDTH * len(tensors)  # that are added up, at most, in another order
    for order, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        scale = max(float(t.abs().max()) for t in theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert float((a - b).abs().max()) <= terms * EPS * scale, order


def test_columns_go_through_it_together() -> None:
    tensors, args = arguments(layers=2)
    gradient = torch.autograd.grad(lstm(*args)[0].sin().sum(), tensors, create_graph=True)
    V = [torch.randn(3, *t.shape, dtype=t.dtype) for t in tensors]
    together = torch.autograd.grad(gradient, tensors, V, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(gradient, tensors, [v[i] for v in V], retain_graph=True)
        for a, b in zip(together, one, strict=True):
            assert torch.allclose(a[i], b, rtol=1e-12, atol=1e-12)


def test_batches_can_be_vectorized_over() -> None:
    _, (x, start, *rest) = arguments(layers=2)
    several = torch.stack([x.detach(), 2 * x.detach()])
    found = torch.vmap(lambda one: lstm(one, start, *rest)[0])(several)
    assert torch.allclose(found[1], lstm(several[1], start, *rest)[0], rtol=1e-12, atol=1e-12)


def test_other_kinds_are_left_to_torch() -> None:
    _, args = arguments()
    x, start, weights, *_ = args
    packed = pack_sequence([x[:5, 0], x[:3, 1]])
    assert lstm(packed.data, packed.batch_sizes, start, weights, True, 1, 0.0, True, False) is None
    assert lstm(x, start, weights, True, 2, 0.5, True, False, False) is None  # dropout
    projection = torch.randn(2, WIDTH, dtype=torch.float64)
    assert lstm(x, start, [*weights, projection], True, 1, 0.0, True, False, False) is None
    assert lstm(x[:0], *args[1:]) is None
    with forward_ad.dual_level():
        assert lstm(*args) is None


def test_a_product_is_the_difference_of_gradients() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(3, 4, num_layers=2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x.transpose(0, 1))[0][-1])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = [(torch.randn(5, 6, 3).double(), torch.randint(2, (5,)))]
        H = HessianOperator(Model().double(), nn.CrossEntropyLoss(), data)
    assert H.check().healthy
