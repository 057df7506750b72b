"""Single products of J'BJ: by dual numbers where these are right, with tangents that keep no graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from hvpop import ForwardOverReverse, outputs
from hvpop.interception import Interception
from hvpop.strategies import Params, ReverseOverReverse
from hvpop.strategies.forward import load_forward_rules
from hvpop.strategies.tangents import TANGENTS
from hvpop.strategies.through_outputs import ATTEMPTS, ThroughOutputs, loss_hessian

F64 = torch.float64
EPS = torch.finfo(F64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, W, C, V = normal(5, 6), normal(4, 6, seed=1), normal(4, seed=2), normal(6, seed=3)
IMAGE = normal(2, 6, 3, 3, seed=4)

CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (F.linear, (X, W, C)),
    "linear without bias": (F.linear, (X, W)),
    "linear of a sequence": (F.linear, (normal(2, 3, 6), W, C)),
    "linear of a vector": (F.linear, (V, W, C)),
    "linear with a vector": (F.linear, (X, V)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), (X, V, normal(6))),
    "layer norm with eps": (lambda x, w: F.layer_norm(x, [6], w, eps=0.1), (X, V)),
    "layer norm without weights": (lambda x: F.layer_norm(x, (6,)), (X,)),
    "layer norm over two axes": (lambda x, w: F.layer_norm(x, (5, 6), w), (X, normal(5, 6))),
    "group norm": (lambda x, w, b: F.group_norm(x, 3, w, b), (IMAGE, V, normal(6))),
    "group norm without weights": (lambda x: F.group_norm(x, 2, eps=0.01), (IMAGE,)),
    "silu": (F.silu, (X,)),
    "gelu": (F.gelu, (X,)),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), (X,)),
    "softmax": (lambda x: F.softmax(x, 1), (X,)),
    "softmax of torch": (lambda x: torch.softmax(x, dim=0), (X,)),
    "softmax as a method": (lambda x: x.softmax(-1), (X,)),
    "softmax in another dtype": (lambda x: x.softmax(-1, dtype=torch.float32).double(), (X,)),
    "tanh": (torch.tanh, (X,)),
    "sigmoid": (lambda x: x.sigmoid(), (X,)),
    "silu in place": (lambda x: F.silu(x * 1.0, inplace=True), (X,)),
}


def pushed(op: Callable[..., Tensor], given: tuple[Tensor, ...], moving: list[bool]) -> Any:
    """The op's value and tangent, where some arguments have one."""
    load_forward_rules()
    with forward_ad.dual_level(), Interception(TANGENTS):
        args = [
            forward_ad.make_dual(t.clone().requires_grad_(), normal(*t.shape, seed=9 + i))
            if m
            else t
            for i, (t, m) in enumerate(zip(given, moving, strict=True))
        ]
        return forward_ad.unpack_dual(op(*args))


@pytest.mark.parametrize("name", CALLS)
def test_tangents_are_the_derivatives_along_their_arguments(name: str) -> None:
    op, given = CALLS[name]
    for moving in range(1, 2 ** len(given)):
        some = [bool(moving >> i & 1) for i in range(len(given))]
        found = pushed(op, given, some)
        assert found.primal.requires_grad
        h = 1e-4  # of fourth order: an error of h^4, and of eps / h

        def at(t: float, some: list[bool] = some) -> Tensor:
            return op(
                *(
                    x + t * normal(*x.shape, seed=9 + i) if m else x
                    for i, (x, m) in enumerate(zip(given, some, strict=True))
                )
            )

        truth = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        single = 1e-7 / EPS / 10 if "another dtype" in name else 1.0
        assert (
            float((found.tangent.detach() - truth).abs().max())
            <= 100 * EPS / h * max(1.0, float(truth.abs().max())) * single
        )
        torch.testing.assert_close(found.primal, op(*given))


def test_the_graph_of_a_value_is_that_of_the_op() -> None:
    for op, given in CALLS.values():
        found = pushed(op, given, [True] + [False] * (len(given) - 1))
        assert found.tangent is not None
        x = given[0].clone().requires_grad_()
        kept = op(x, *given[1:])
        names = {node.name() for node in _nodes(kept)}
        assert names <= {node.name() for node in _nodes(found.primal)}


def test_tangents_that_need_none_have_no_graph() -> None:
    for name in ("linear", "layer norm", "group norm", "silu", "softmax"):
        op, given = CALLS[name]
        assert not pushed(op, given, [True] * len(given)).tangent.requires_grad


def _nodes(t: Tensor) -> Any:
    from hvpop.graph import nodes_of

    return nodes_of([t])


# -- single products -------------------------------------------------------------------------------


def network(params: Params, x: Tensor, y: Tensor) -> Tensor:
    h = F.silu(F.linear(x, params["w"], params["b"]))
    return F.cross_entropy(outputs(F.linear(h, params["u"])), y)


POINT = {"w": W, "b": C, "u": normal(3, 4, seed=5)}
DATA = X, torch.tensor([0, 1, 2, 1, 0])
DIRECTION = {name: normal(*p.shape, seed=7) for name, p in POINT.items()}


def strategy() -> ThroughOutputs:
    return ThroughOutputs(ReverseOverReverse(), loss_hessian)


def same(a: Params, b: Params) -> bool:
    return all(float((a[n] - b[n]).norm()) <= 1e3 * EPS * float(b[n].norm()) for n in b)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with each map whose graphs are kept."""
    made: list[object] = []
    linearize = ThroughOutputs.linearize

    def counting(self: ThroughOutputs, *args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return linearize(self, *args, **kwargs)

    monkeypatch.setattr(ThroughOutputs, "linearize", counting)
    return made


def test_a_single_product_takes_dual_numbers_once_they_are_seen_to_be_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = strategy().linearize(network, POINT, *DATA)(DIRECTION)
    made, J = counted(monkeypatch), strategy()
    for _ in range(3):
        assert same(J.once(network, POINT, *DATA)(DIRECTION), truth)
    assert len(made) == 1  # for the first, to compare with


def test_an_op_that_was_not_seen_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bent = [False]

    def function(params: Params, x: Tensor, y: Tensor) -> Tensor:
        h = F.linear(x, params["w"], params["b"])
        return F.mse_loss(outputs(h.erf() if bent[0] else h), y)

    made, J = counted(monkeypatch), strategy()
    for later in (False, False, True, True):
        bent[0] = later
        J.once(function, POINT, X, normal(5, 4))(DIRECTION)
        assert len(made) == (2 if later else 1)


class Without(torch.autograd.Function):
    """It has no jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Wrong(Without):
    """Its jvp says twice what its backward does."""

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 2 * t


@pytest.mark.parametrize("custom", [Wrong, Without])
def test_where_dual_numbers_are_wrong_or_missing_graphs_are_kept(custom: Any) -> None:
    def function(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs(custom.apply(F.linear(x, params["w"], params["b"]))), y)

    J, data = strategy(), (X, torch.tensor([0, 1, 2, 3, 0]))
    point = {name: POINT[name] for name in ("w", "b")}
    truth = strategy().linearize(function, point, *data)(DIRECTION)
    for _ in range(2):
        assert same(J.once(function, point, *data)(DIRECTION), truth)
    assert J._attempts == ATTEMPTS


def test_zeros_prove_nothing() -> None:
    """Nothing comes to the first layer past a second one of zeros."""
    point = POINT | {"u": torch.zeros(3, 4, dtype=F64)}
    J = strategy()
    for attempt in range(1, 5):
        J.once(network, point, *DATA)(DIRECTION)
        assert not J._pushed
        assert J._attempts == min(attempt, ATTEMPTS)


def test_parameters_that_nothing_depends_on_are_no_such_zeros() -> None:
    J, point = strategy(), POINT | {"unused": V}
    J.once(network, point, *DATA)(DIRECTION | {"unused": V})
    assert J._pushed


def test_strategies_that_were_asked_for_serve_single_products_too() -> None:
    J = ThroughOutputs(ForwardOverReverse(), loss_hessian)
    truth = strategy().linearize(network, POINT, *DATA)(DIRECTION)
    assert same(J.once(network, POINT, *DATA)(DIRECTION), truth)


def test_module_activations_and_norms_meet_the_rules() -> None:
    """By the ops that modules call: a model of them is not left to torch's slower way."""
    seen: list[Any] = []

    def noting(op: Any) -> Any:
        return lambda *args, **kwargs: seen.append(op)

    model = nn.Sequential(
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.SiLU(),
        nn.GELU(),
        nn.Tanh(),
        nn.Softmax(1),
        nn.Sigmoid(),
    ).double()
    with Interception({op: noting(op) for op in TANGENTS}):
        nn.GroupNorm(3, 6).double()(IMAGE)
        model(X)
    assert len(seen) == 8
