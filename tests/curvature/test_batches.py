"""Batches of any form, on any device, made in any mode."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hvpop import EmpiricalRisk, HessianOperator
from hvpop.risk import autoencoder, supervised

from .problems import error, mlp, random, regression, set_parameters, split

TIGHT = 1e-12
BATCHES = split(regression(), (10, 10, 3))


class Named(NamedTuple):
    x: Tensor
    y: Tensor


Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    where: str = "a file"
    length: int = dataclasses.field(init=False, default=0)


class Encoding(UserDict[str, Any]):
    """As Hugging Face's: a mapping with attributes, that knows how to move."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class ReadOnly(Mapping[str, Any]):
    """A mapping that has nothing but what the protocol asks for, and takes items."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items = self._items | {key: value}

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Opaque:
    """A batch of a graph library: an object with tensors inside and ``.to``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: torch.device) -> Opaque:
        return Opaque(self.x.to(device), self.y.to(device))

    def __len__(self) -> int:
        return len(self.x)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return HessianOperator(mlp(), nn.MSELoss(), BATCHES).to_dense()


class Keyword(nn.Module):
    """The network with its input under a name, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, where: Any = None) -> Tensor:
        return self.net(x)


PAIRS: dict[str, Any] = {
    "tuples": tuple,
    "lists": list,
    "named tuples": lambda xy: Named(*xy),
    "made named tuples": lambda xy: Pair(*xy),
    "nested": lambda xy: ((xy[0],), xy[1]),
    "nested lists": lambda xy: [[xy[0]], xy[1]],
    "inputs by name": lambda xy: ({"x": xy[0]}, xy[1]),
    "more inputs": lambda xy: (xy[0], torch.zeros(len(xy[0])), xy[1]),
    "strings beside": lambda xy: ({"x": xy[0], "where": ["file"] * len(xy[0])}, xy[1]),
    "mapping": lambda xy: {"x": xy[0], "labels": xy[1]},
    "ordered mapping": lambda xy: OrderedDict(x=xy[0], labels=xy[1]),
    "encoding": lambda xy: Encoding(x=xy[0], labels=xy[1]),
    "own mapping": lambda xy: ReadOnly(x=xy[0], labels=xy[1]),
}


@pytest.mark.parametrize("form", PAIRS)
def test_supervised_batches_come_in_many_forms(form: str, expected: Tensor) -> None:
    data = [PAIRS[form](pair) for pair in BATCHES]
    H = HessianOperator(Keyword(), nn.MSELoss(), data)
    assert error(H.to_dense(), expected) < TIGHT
    assert error(H.linearize().to_dense(), expected) < TIGHT
    assert error(H.linearize(memory=0).to_dense(), expected) < TIGHT


FORMS: dict[str, tuple[Any, Any]] = {
    "dataclass": (lambda xy: Record(*xy), lambda b: (b.x, b.y)),
    "object": (lambda xy: Opaque(*xy), lambda b: (b.x, b.y)),
    "deep": (
        lambda xy: {"a": [(xy[0], {"b": xy[1]})]},
        lambda b: (b["a"][0][0], b["a"][0][1]["b"]),
    ),
    "one tensor": (lambda xy: torch.cat(xy, 1), lambda b: (b[:, :4], b[:, 4:])),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_loss_takes_batches_of_any_form(form: str, expected: Tensor) -> None:
    make, pair_of = FORMS[form]

    def batch_loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = pair_of(batch)
        return F.mse_loss(model(x), y)

    risk = EmpiricalRisk.from_batch_loss(mlp(), batch_loss, [make(pair) for pair in BATCHES])
    H = HessianOperator.from_risk(risk)
    assert error(H.to_dense(), expected) < TIGHT
    assert error(H.linearize().to_dense(), expected) < TIGHT


def test_targets_may_have_another_name(expected: Tensor) -> None:
    data = [{"x": x, "goal": y} for x, y in BATCHES]
    batch_loss = supervised(nn.MSELoss(), targets="goal")
    H = HessianOperator.from_risk(EmpiricalRisk.from_batch_loss(Keyword(), batch_loss, data))
    assert error(H.to_dense(), expected) < TIGHT


def test_targets_may_be_other_things_than_tensors() -> None:
    data = [(x, 0.5) for x, _ in BATCHES]
    H = HessianOperator(mlp(), lambda out, y: (out - y).square().mean(), data)
    tensors = [(x, torch.full((len(x), 3), 0.5, dtype=x.dtype)) for x, _ in BATCHES]
    assert error(H.to_dense(), HessianOperator(mlp(), nn.MSELoss(), tensors).to_dense()) < TIGHT
    zero_dim = [(x, torch.tensor(0.5, dtype=x.dtype)) for x, _ in BATCHES]
    H = HessianOperator(mlp(), lambda out, y: (out - y).square().mean(), zero_dim)
    assert error(H.to_dense(), HessianOperator(mlp(), nn.MSELoss(), tensors).to_dense()) < TIGHT


@pytest.mark.parametrize("form", ["one tensor", "with labels"])
def test_an_autoencoder_has_its_inputs_as_targets(form: str) -> None:
    xs = [x for x, _ in BATCHES]
    data = xs if form == "one tensor" else [(x, torch.zeros(len(x))) for x in xs]
    model = mlp(4, 3, 4)
    H = HessianOperator.from_risk(
        EmpiricalRisk.from_batch_loss(model, autoencoder(nn.MSELoss()), data)
    )
    expected = HessianOperator(model, nn.MSELoss(), [(x, x) for x in xs]).to_dense()
    assert error(H.to_dense(), expected) < TIGHT


def test_a_packed_sequence_is_an_input() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(2, 3)
            set_parameters(self.double())

        def forward(self, x: Tensor | PackedSequence) -> Tensor:
            return self.rnn(x)[1][0]

    sequences = [random(length, 2, seed=length) for length in (4, 3, 1)]
    y = random(3, 3)
    model = Recurrent()
    packed = HessianOperator(model, nn.MSELoss(), [(pack_sequence(sequences), y)])
    single = [(s[:, None], target[None]) for s, target in zip(sequences, y, strict=True)]
    expected = HessianOperator(model, nn.MSELoss(), single)
    assert error(packed.to_dense(), expected.to_dense()) < TIGHT


def test_batches_made_under_inference_mode_are_taken(expected: Tensor) -> None:
    with torch.inference_mode():
        data = [Record(x.clone(), y.clone()) for x, y in BATCHES]
    risk = EmpiricalRisk.from_batch_loss(mlp(), lambda m, b: F.mse_loss(m(b.x), b.y), data)
    H = HessianOperator.from_risk(risk)
    assert error(H.to_dense(), expected) < TIGHT
    assert error(H.linearize().to_dense(), expected) < TIGHT
    assert all(b.x.is_inference() for b in data)


def test_batches_follow_the_model_to_its_device() -> None:
    """On the meta device, which is always there: shapes without numbers."""
    seen: list[torch.device] = []

    def batch_loss(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(t.device for t in (batch["x"], *batch["y"]))
        raise _SeenEnoughError

    data = [{"x": torch.ones(2, 4), "y": (torch.ones(2, 3), torch.ones(1))}]
    risk = EmpiricalRisk.from_batch_loss(mlp().to("meta"), batch_loss, data)
    (term,) = risk.terms()
    with pytest.raises(_SeenEnoughError):
        term.function(risk.parameters(), risk.state(), *term.data)
    assert seen == [torch.device("meta")] * 3
    assert data[0]["x"].device == torch.device("cpu")


class _SeenEnoughError(Exception):
    pass
