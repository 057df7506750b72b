"""Formulas of activations: torch's values and derivatives of three orders, and where torch's way is taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from hvpop import HessianOperator
from hvpop.risk import description
from hvpop.risk.formulas import activations
from hvpop.risk.formulas.activations import ACTIVATIONS, SMALL, gelu, silu
from hvpop.strategies import Compiled, HVPStrategy, ReverseOverReverse
from hvpop.strategies.by_nodes import ByNodes

Op = Callable[..., Tensor]

OPS: dict[str, Op] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu, tanh": partial(F.gelu, approximate="tanh"),
}

CONDITION = 32
"""How many times larger than a number's rounding that of f''(x), near 1 at most, may be: its powers of x, at most
the third of 4, and the 12 operations on them, in torch's formula and in ours."""


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALL", 0)
    monkeypatch.setattr(description, "MANY", 0)


@pytest.fixture(params=OPS)
def both(request: pytest.FixtureRequest, every_size: None) -> tuple[Op, Op]:
    """Ours and torch's."""
    op = OPS[request.param]
    if isinstance(op, partial):
        return partial(ACTIVATIONS[op.func], **op.keywords), op
    return ACTIVATIONS[op], op


def places(dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.linspace(-12, 12, 481), torch.tensor([1e-8, 1e3, -1e3])]).to(dtype)


def derivatives(op: Op, x: Tensor) -> list[Tensor]:
    """The value, and the first three derivatives, the second both with and without a graph of its own."""
    x = x.clone().requires_grad_()
    y = op(x)
    ones = torch.ones_like(x)
    (first,) = torch.autograd.grad(y, x, ones, create_graph=True)
    (second,) = torch.autograd.grad(first, x, ones, create_graph=True)
    (kept,) = torch.autograd.grad(first, x, ones, retain_graph=True)
    (third,) = torch.autograd.grad(second, x, ones)
    return [t.detach() for t in (y, first, second, kept, third)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_derivatives_of_three_orders_are_torchs(both: tuple[Op, Op], dtype: torch.dtype) -> None:
    x = places(dtype)
    for found, expected in zip(*(derivatives(op, x) for op in both), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())  # torch's third of gelu at 1e3
        bound = CONDITION * torch.finfo(dtype).eps
        assert float((found - expected).nan_to_num().abs().max()) <= bound


def test_second_derivatives_are_finite_wherever_torchs_are(both: tuple[Op, Op]) -> None:
    x = torch.tensor([0.0, 30.0, 1e5, 1e10, 1e20, float("inf")])
    x = torch.cat([x, -x])
    ours, theirs = (derivatives(op, x)[3] for op in both)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    tails = theirs.isfinite() & (x.abs() >= 30)
    assert torch.equal(ours[tails], theirs[tails])  # which are those of the limits, exactly


def test_columns_go_through_it_together(both: tuple[Op, Op]) -> None:
    x = places(torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(both[0](x).sin().sum(), x, create_graph=True)
    V = torch.stack([torch.ones_like(x), x.detach().cos(), torch.zeros_like(x)])
    (together,) = torch.autograd.grad(slope, x, V, retain_graph=True, is_grads_batched=True)
    for v, column in zip(V, together, strict=True):
        (one,) = torch.autograd.grad(slope, x, v, retain_graph=True)
        assert torch.equal(column, one)


def test_batches_can_be_vectorized_over(both: tuple[Op, Op]) -> None:
    ours, theirs = both
    X = torch.stack([places(torch.float64), places(torch.float64).cos()])
    assert torch.equal(torch.vmap(ours)(X), theirs(X))
    by_rows = torch.func.vmap(torch.func.grad(lambda x: ours(x).square().sum()))(X)
    X.requires_grad_()
    assert torch.equal(by_rows, *torch.autograd.grad(theirs(X).square().sum(), X))


def test_other_kinds_are_left_to_torch() -> None:
    x = torch.zeros(SMALL)
    for op in ACTIVATIONS.values():
        assert op(x[1:]) is None
        assert op(x) is not None
        with torch.autocast("cpu"):
            assert op(x) is None
        with forward_ad.dual_level():
            assert op(x) is None
        assert op(x.long()) is None
        assert op(x.to(torch.complex64)) is None
    assert silu(x, inplace=True) is None
    assert gelu(x, approximate="none, or so") is None


@pytest.mark.parametrize(
    "strategy", [ReverseOverReverse(), Compiled(compiler=False)], ids=["kept", "traced"]
)
@pytest.mark.parametrize(
    "layer", [nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh")], ids=str
)
def test_a_network_of_them_has_torchs_matrix(
    every_size: None, monkeypatch: pytest.MonkeyPatch, strategy: HVPStrategy, layer: nn.Module
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 6), layer, nn.Linear(6, 3)).double()
    data = [(torch.randn(8, 4).double(), torch.randint(3, (8,)))]
    applied = []
    monkeypatch.setattr(
        activations,
        "applied",
        lambda *args: applied.append(args) or activations.Applied.apply(*args),
    )
    H = HessianOperator(model, nn.CrossEntropyLoss(), data, strategy=strategy).linearize()
    identity = torch.eye(H.shape[1], dtype=torch.float64)
    found = H @ identity
    assert applied
    monkeypatch.setattr(activations, "SMALL", 2**62)
    plain = HessianOperator(model, nn.CrossEntropyLoss(), data, strategy=ReverseOverReverse())
    expected = plain @ identity
    eps = torch.finfo(torch.float64).eps
    assert float((found - expected).abs().max()) <= H.shape[0] * eps * float(expected.abs().max())


def test_ordinary_models_are_looked_at_where_their_layers_are_large() -> None:
    def gains(model: nn.Module, rows: int) -> bool:
        H = HessianOperator(
            model, nn.CrossEntropyLoss(), [(torch.zeros(rows, 2), torch.zeros(rows).long())]
        )
        return H.risk.function.now.gains((torch.zeros(rows, 2), None))

    bent = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    rows = description.MANY // 64
    assert gains(bent, rows)
    assert not gains(bent, rows - 1)
    assert not gains(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2)), rows)


def test_their_jacobian_is_read_off_the_graph(both: tuple[Op, Op]) -> None:
    """Else a Gauss-Newton matrix would need a second graph."""
    x, w = places(torch.float64).reshape(44, 11), torch.linspace(-1, 1, 33).double().reshape(11, 3)
    w.requires_grad_()
    ours, theirs = ((f(x @ w),) for f in both)
    V = torch.stack([torch.ones_like(w), w.detach().cos()])
    S = torch.stack([torch.ones(44, 3).double(), (x @ w).detach().sin()])
    for once in (False, True):
        own, torchs = (ByNodes(z, {"w": w}, once=once) for z in (ours, theirs))
        for v, s in zip(V, S, strict=True):
            assert torch.equal(own.push({"w": v})[0], torchs.push({"w": v})[0])
            assert torch.equal(own.pull([s.clone()])["w"], torchs.pull([s.clone()])["w"])
        assert own.width() == torchs.width() > 1
        assert torch.equal(own.push({"w": V}, 2)[0], torchs.push({"w": V}, 2)[0])
        assert torch.equal(own.pull([S.clone()], 2)["w"], torchs.pull([S.clone()], 2)["w"])
