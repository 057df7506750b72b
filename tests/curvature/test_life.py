"""A linearized operator is one matrix for its whole life, and says when it is no longer the model's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import (
    Compiled,
    EmpiricalRisk,
    ForwardOverReverse,
    HessianOperator,
    ReverseOverReverse,
)

from .problems import classes, error, random, set_parameters, split

DATA = split((random(12, 3), classes(12)), (5, 5, 2))
TIGHT = 1e-12


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


class Configured(nn.Module):
    slope = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.act: nn.Module = nn.Softplus()
        self.norm = nn.BatchNorm1d(4)
        self.config: dict[str, Any] = {"deep": {"deeper": {"scale": 1.0}}}
        self.skipped: set[str] = set()
        self.scale = torch.tensor(1.0)
        self.slots = Slots()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)) * self.config["deep"]["deeper"]["scale"] * self.slots.value
        h = h * self.scale * self.slope
        return self.last(h if "act" in self.skipped else self.act(h))


def change_a_rate(m: Configured) -> None:
    m.act.beta = 5.0


def replace_a_module(m: Configured) -> None:
    m.act = nn.ReLU()


def change_nested(m: Configured) -> None:
    m.config["deep"]["deeper"]["scale"] = 3.0


def add_to_a_set(m: Configured) -> None:
    m.skipped.add("act")


def write_a_tensor(m: Configured) -> None:
    m.scale.mul_(3.0)


def change_slots(m: Configured) -> None:
    m.slots.value = 3.0


def evaluate(m: Configured) -> None:
    m.eval()


def untie(m: Configured) -> None:
    m.last.weight = nn.Parameter(torch.ones_like(m.last.weight))


def to_single(m: Configured) -> None:
    m.float()


CHANGES = [
    change_a_rate,
    replace_a_module,
    change_nested,
    add_to_a_set,
    write_a_tensor,
    change_slots,
    evaluate,
    untie,
    to_single,
]
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)


@each_change
@pytest.mark.parametrize("memory", [0, None], ids=["nothing kept", "kept"])
def test_a_change_of_the_model_moves_nothing(
    change: Callable[[Configured], None], memory: Any
) -> None:
    net = set_parameters(Configured().double())
    A = HessianOperator(net, nn.CrossEntropyLoss(), DATA).linearize(memory=memory)
    v = random(A.shape[1])
    before = A @ v
    assert A.is_current()
    change(net)
    assert not A.is_current()
    assert error(A @ v, before) < TIGHT


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in (untie, to_single)])
def test_a_trace_follows_every_change(change: Callable[[Configured], None]) -> None:
    net = set_parameters(Configured().double())
    net.eval() if change is not evaluate else None
    H = HessianOperator(net, nn.CrossEntropyLoss(), DATA[:1], strategy=Compiled(compiler=False))
    v = random(H.shape[1])
    before = H @ v
    change(net)
    expected = HessianOperator(net, nn.CrossEntropyLoss(), DATA[:1]) @ v
    assert error(before, expected) > 1e-3
    assert error(H @ v, expected) < TIGHT
    assert error(H.linearize() @ v, expected) < TIGHT


LEVEL: Any = ModuleType("level")  # whose attributes nobody looks at
LEVEL.slope = 1.0


def test_a_trace_that_cannot_see_what_it_depends_on_is_found_out() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (LEVEL.slope * self.layer(x)).tanh()

    net = set_parameters(Hidden().double())
    H = HessianOperator(net, nn.CrossEntropyLoss(), DATA[:1], strategy=Compiled(compiler=False))
    v = random(H.shape[1])
    H.linearize() @ v
    try:
        LEVEL.slope = 3.0
        with pytest.warns(UserWarning, match="is traced anew"):
            product = H.linearize() @ v
        assert error(product, HessianOperator(net, nn.CrossEntropyLoss(), DATA[:1]) @ v) < TIGHT
    finally:
        LEVEL.slope = 1.0


SCALES = {"first": 1.0}
CALLS: dict[str, int] = {}


def scaled(h: Tensor) -> Tensor:
    return h * SCALES["first"]


class Tools:
    """Holds a library, which leads to thousands of things, before what counts."""

    def __init__(self, library: Any, function: Any) -> None:
        self.library, self.scaled = library, function


class Shared(nn.Module):
    """Of things that belong to nobody's instance."""

    slope = 1.0

    def __init__(self, tools: Tools) -> None:
        super().__init__()
        self.tools = tools
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        CALLS["count"] = CALLS.get("count", 0) + 1
        return self.last(self.act(self.tools.scaled(self.first(x)) * Shared.slope))

    def act(self, h: Tensor) -> Tensor:
        return h.tanh()


SHARED: dict[str, tuple[Any, Any, Any]] = {
    "global": (SCALES.__setitem__, "first", 3.0),
    "class attribute": (lambda *pair: setattr(Shared, *pair), "slope", 3.0),
    "method": (lambda *pair: setattr(Shared, *pair), "act", lambda self, h: h.sin()),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("way", ["again at each product", "forward mode", "before the first"])
def test_what_nobody_can_put_back_is_refused_where_it_is_looked_at_again(
    name: str, way: str
) -> None:
    put, key, value = SHARED[name]
    before = {"first": SCALES["first"], "slope": 1.0, "act": Shared.act}[key]
    model = set_parameters(Shared(Tools(torch, scaled)).double())
    strategy = ForwardOverReverse() if way == "forward mode" else None
    H = HessianOperator(model, nn.CrossEntropyLoss(), DATA, strategy=strategy)
    v = random(H.shape[1])
    kept, A = H.linearize(), H.linearize(memory=0)
    expected = kept @ v
    if way != "before the first":
        assert error(A @ v, expected) < TIGHT
    H @ v  # which counts, and changes no loss
    if way != "before the first":
        assert error(A @ v, expected) < TIGHT
    put(key, value)
    try:
        assert error(H @ v, expected) > 0.01
        if strategy is None:
            assert error(kept @ v, expected) == 0.0
        with pytest.raises(RuntimeError, match="has changed since linearize"):
            A @ v
    finally:
        put(key, before)
    if way != "before the first":
        assert error(A @ v, expected) < TIGHT
    assert error(H.linearize(memory=0) @ v, expected) < TIGHT


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * x).tanh()


@pytest.mark.parametrize("how", [{}, {"memory": 0}], ids=["kept", "again"])
@pytest.mark.parametrize("strategy", [None, ReverseOverReverse(), ForwardOverReverse()], ids=repr)
def test_data_that_is_written_to_in_place_is_named(strategy: Any, how: dict[str, Any]) -> None:
    data = [(x.clone(), y) for x, y in DATA[:1]]
    model = set_parameters(Wide().double())
    H = HessianOperator(model, lambda o, y: F.cross_entropy(o, y), data, strategy=strategy)
    A, v = H.linearize(**how), random(H.shape[1])
    A @ v
    data[0][0].mul_(2.0)
    with pytest.raises(RuntimeError, match="data of batch 0 has been written to in place"):
        A @ v
    assert error(H.linearize() @ v, H @ v) < TIGHT


@pytest.mark.parametrize("how", [{}, {"memory": 0}], ids=["kept", "again"])
@pytest.mark.parametrize("batches", [1, 2])
def test_data_that_is_written_through_an_ndarray_later_is_named(
    batches: int, how: dict[str, Any]
) -> None:
    data = [(x.clone(), y.clone()) for x, y in DATA[:batches]]
    model = set_parameters(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    A = HessianOperator(model, nn.CrossEntropyLoss(), data).linearize(**how)
    v = random(A.shape[1])
    before = A @ v
    seen = data[0][0].numpy()
    assert torch.equal(A @ v, before)  # to be looked at is not to be written to
    seen *= 2.0
    if batches == 1 or how:
        with pytest.raises(RuntimeError, match="data of batch 0 has been written to in place"):
            A @ v
    else:  # batches that run as one are copies
        assert torch.equal(A @ v, before)


@pytest.mark.parametrize("kind", ["tensors of ndarrays", "ndarrays", "in a dict"])
def test_data_that_ndarrays_share_is_copied(kind: str) -> None:
    x, y = (t.clone().numpy() for t in DATA[0])
    model = set_parameters(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    pair = (torch.from_numpy(x), torch.from_numpy(y))
    if kind == "tensors of ndarrays":
        H = HessianOperator(model, nn.CrossEntropyLoss(), [pair])
    else:
        batch: Any = {"x": pair[0], "y": pair[1]} if kind == "in a dict" else {"x": x, "y": y}
        risk = EmpiricalRisk.from_batch_loss(
            model,
            lambda m, b: F.cross_entropy(m(torch.as_tensor(b["x"])), torch.as_tensor(b["y"])),
            [batch],
        )
        H = HessianOperator.from_risk(risk)
    A = H.linearize()
    v = random(A.shape[1])
    before = A @ v
    x *= 2.0
    assert torch.equal(A @ v, before)
    assert error(H @ v, before) > 0.01


def test_linearize_keeps_nothing_once_it_is_gone() -> None:
    net = set_parameters(
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    )
    H = HessianOperator(net, nn.CrossEntropyLoss(), DATA)
    v = random(H.shape[1])

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())

    for _ in range(2):
        H.linearize() @ v
    before = alive()
    for _ in range(5):
        H.linearize() @ v
    assert alive() <= before


def test_a_block_of_small_curvature_counts_in_the_proof_of_a_join() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.price, self.f = nn.Linear(6, 1), nn.Linear(6, 5)
            self.norm, self.bn, self.g = nn.BatchNorm1d(6), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.price(x), self.g(self.bn(self.f(self.norm(x))).tanh())

    def loss(out: Any, t: Any) -> Tensor:
        return F.mse_loss(out[0], t[0]) + F.cross_entropy(out[1], t[1])

    net = set_parameters(Net()).float()
    x, price, y = 1000 * random(32, 6).float(), 1000 * random(32, 1).float(), classes(32)
    parts = zip(x.split(8), price.split(8), y.split(8), strict=True)
    data = [(a, (b, c)) for a, b, c in parts]
    H = HessianOperator(net, loss, data)
    v = random(H.shape[1]).float()
    live, linearized = H @ v, H.linearize() @ v
    for name, place in H.layout.slices():
        off = (live[place] - linearized[place]).norm()
        assert off <= 1e-2 * live[place].norm() + 1e-4, name


def test_batches_of_other_shapes_than_the_first_are_run_by_themselves() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = set_parameters(net.append(nn.Linear(2, 3)).double())
    data = [(random(4, 1, s, s, seed=s), classes(4)) for s in (8, 8, 12, 8)]
    H = HessianOperator(net, nn.CrossEntropyLoss(), data)
    v = random(H.shape[1])
    singles = [HessianOperator(net, nn.CrossEntropyLoss(), [batch]) @ v for batch in data]
    assert error(H @ v, torch.stack(singles).mean(0)) < TIGHT
    assert error(H.linearize() @ v, H @ v) < TIGHT


def test_zero_against_zero_proves_no_join() -> None:
    net = set_parameters(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Softmax(dim=0)).double())
    inputs = [torch.zeros(4, 3).double()] * 2 + [2 * random(4, 3, seed=s) for s in range(3)]
    data = [(x, classes(4)) for x in inputs]
    H = HessianOperator(net, nn.CrossEntropyLoss(), data)
    v = random(H.shape[1])
    singles = [HessianOperator(net, nn.CrossEntropyLoss(), [batch]) @ v for batch in data]
    for A in (H, H.linearize()):
        assert error(A @ v, torch.stack(singles).mean(0)) < TIGHT
