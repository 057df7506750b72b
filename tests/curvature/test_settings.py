"""A change of a setting counts at the next product, traced or not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import Compiled, HessianOperator
from hvpop.risk.settings import settings_of

from .problems import error

TIGHT = 1e-12


class Weighted:
    """A loss that is no module."""

    def __init__(self) -> None:
        self.config = {"power": 2.0}

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.abs() ** self.config["power"]).mean() + F.cross_entropy(outputs, targets)


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=1),
            nn.BatchNorm1d(3),
            nn.ELU(),
            nn.AdaptiveAvgPool1d(2),
            nn.Flatten(),
            nn.Linear(6, 3),
        ).double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 7, generator=generator, dtype=torch.float64)
    return [(x, torch.arange(8) % 3)]


def replace_a_module(model: nn.Sequential, loss: Any) -> None:
    model[2] = nn.Tanh()


def change_a_tuple(model: nn.Sequential, loss: Any) -> None:
    model[0].padding = (2,)


def change_a_number(model: nn.Sequential, loss: Any) -> None:
    model[2].alpha = 0.3


def evaluate(model: nn.Sequential, loss: Any) -> None:
    model.eval()


def hook(model: nn.Sequential, loss: Any) -> None:
    model[2].register_forward_hook(lambda module, args, out: out * 2)


def change_the_loss(model: nn.Sequential, loss: Any) -> None:
    loss.config["power"] = 4.0


CHANGES = [replace_a_module, change_a_tuple, change_a_number, evaluate, hook, change_the_loss]
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@each_change
@pytest.mark.parametrize("live", [True, False], ids=["live", "linearized"])
def test_traces_follow_changes(change: Callable[[nn.Sequential, Any], None], live: bool) -> None:
    net, loss = model(), Weighted()
    H = HessianOperator(net, loss, data(), strategy=Compiled(compiler=False))
    v = torch.ones(H.shape[0], dtype=torch.float64)
    before = H @ v if live else H.linearize() @ v
    change(net, loss)
    after = H @ v if live else H.linearize() @ v
    expected = HessianOperator(net, loss, data()) @ v
    assert error(after, expected) < TIGHT
    assert error(before, expected) > 1e-3  # so that the change was one


@each_change
def test_a_description_tells_changes(change: Callable[[nn.Sequential, Any], None]) -> None:
    net, loss = model(), Weighted()

    def described() -> Any:
        return settings_of(*net.modules(), loss)

    before = described()
    assert described() == before
    change(net, loss)
    assert described() != before


def test_a_training_step_changes_no_setting_so_that_the_trace_serves_again() -> None:
    net, loss = model(), Weighted()
    H = HessianOperator(net, loss, data())
    frozen = H.risk.frozen()
    (x, y) = data()[0]
    loss(net(x), y).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert H.risk.frozen() is frozen


def test_what_is_no_number_is_compared_too() -> None:
    class Odd:
        def __init__(self) -> None:
            self.values = (float("nan"), torch.ones(2), [len, {"deep": Weighted()}])
            self.myself = self
            self.endless: list[Any] = [1]
            self.endless.append(self.endless)

    odd = Odd()
    assert settings_of(odd) == settings_of(odd)
    assert settings_of(odd) != settings_of(Odd())
    long = [0] * 100_000
    assert settings_of(long) == settings_of(long)
    assert settings_of(long) != settings_of(list(long))


SCALES = {"held": [1.0]}


class Global:
    scale = 1.0


def scaled(x: Tensor) -> Tensor:
    return torch.stack([row * SCALES["held"][0] for row in x]) * Global.scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = deque([1.0, 3.0])
        self.act = partial(F.elu, alpha=1.0)
        self.table = [torch.ones(60, 60, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.act(scaled(x) * self.line[0] * self.table[0].mean()))

    def turned(self, x: Tensor) -> Tensor:
        return x


HIDDEN: dict[str, Callable[[Scaled, pytest.MonkeyPatch], Any]] = {
    "a deque": lambda m, patch: m.line.rotate(1),
    "keywords of a partial": lambda m, patch: m.act.keywords.update(alpha=3.0),
    "a table in a list, through data": lambda m, patch: m.table[0].data.mul_(3.0),
    "a table in a list, through NumPy": lambda m, patch: m.table[0].numpy().fill(3.0),
    "a global that a helper reads": lambda m, patch: patch.setitem(SCALES, "held", [3.0]),
    "a class that a helper reads": lambda m, patch: patch.setattr(Global, "scale", 3.0),
    "a method": lambda m, patch: patch.setattr(Scaled, "turned", lambda self, x: x.sin()),
}


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("strategy", [None, Compiled(compiler=False)], ids=["default", "traced"])
def test_what_a_forward_pass_reads_beside_its_tensors_counts_wherever_it_is(
    how: str, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), Scaled(), nn.Linear(3, 2)).double()
        batch = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    H = HessianOperator(net, nn.MSELoss(), [batch], strategy=strategy)
    v = torch.ones(H.shape[0], dtype=torch.float64)
    A = H.linearize()
    before, frozen = H @ v, A @ v
    HIDDEN[how](net[1], monkeypatch)
    assert not A.is_current()
    expected = HessianOperator(net, nn.MSELoss(), [batch]) @ v
    assert error(before, expected) > 1e-3
    assert error(H @ v, expected) < TIGHT
    assert error(H.linearize() @ v, expected) < TIGHT
    assert error(A @ v, frozen) < TIGHT


def test_no_storage_of_the_users_is_held_at_its_size() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 3), [torch.ones(3)]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale[0]

    model, x, y = Model(), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    H = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    v = torch.randn(H.shape[1])
    H.linearize() @ v
    assert H.linearize(memory=0).is_current()
    H.report()
    for tensor in (x, y, v, model.scale[0], model.layer.weight.data):
        assert tensor.untyped_storage().resizable()
