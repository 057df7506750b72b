"""``params=``: which parameters count, named in every way, each of them once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import EmpiricalRisk, HessianOperator
from tests.curvature.problems import Scaled, random


class Tied(nn.Module):
    """An encoder, a decoder with the encoder's weight, and one layer that is held twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.middle = nn.Linear(3, 3)
        self.twice = self.middle
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight
        self.gain = nn.Parameter(torch.tensor(1.2))
        self.double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.5 * random(*p.shape, seed=i) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x))
        h = torch.tanh(self.twice(torch.tanh(self.middle(h))))
        return self.gain * self.decoder(h)


DATA = [(random(n, 3, seed=20 + n), random(n, 3, seed=40 + n)) for n in (5, 3)]
NAMES = ["gain", "encoder.weight", "encoder.bias", "middle.weight", "middle.bias", "decoder.bias"]


def names(selection: Any, model: nn.Module | None = None) -> list[str]:
    risk = EmpiricalRisk(model or Tied(), nn.MSELoss(), DATA, params=selection)
    return list(risk.parameters())


def test_all_trainable_parameters_count_by_default_and_tied_ones_once() -> None:
    model = Tied()
    assert names(None, model) == NAMES
    assert names(None, model) == [name for name, _ in model.named_parameters()]


SELECTIONS: dict[str, tuple[Any, list[str]]] = {
    "a name": ("middle.bias", ["middle.bias"]),
    "a glob": ("*.bias", ["encoder.bias", "middle.bias", "decoder.bias"]),
    "a glob of a module": ("encoder.*", ["encoder.weight", "encoder.bias"]),
    "a class of characters": ("[em]*.weight", ["encoder.weight", "middle.weight"]),
    "everything": ("*", NAMES),
    "the other name of a tied one": ("decoder.weight", ["encoder.weight"]),
    "the other name of a module held twice": ("twice.*", ["middle.weight", "middle.bias"]),
    "several, in the model's order": (
        ["decoder.bias", "gain", "*.weight"],
        ["gain", "encoder.weight", "middle.weight", "decoder.bias"],
    ),
    "overlapping": (("encoder.*", "encoder.bias"), ["encoder.weight", "encoder.bias"]),
    "a set": ({"gain", "middle.bias"}, ["gain", "middle.bias"]),
    "a generator": ((name for name in ["gain"]), ["gain"]),
    "the keys of a mapping": ({"middle.bias": None, "gain": 3}, ["gain", "middle.bias"]),
    "a predicate": (lambda name, p: p.ndim == 1, ["encoder.bias", "middle.bias", "decoder.bias"]),
    "a predicate and a name": (
        [lambda name, p: p.ndim == 0, "middle.bias"],
        ["gain", "middle.bias"],
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_parameters_are_selected_by_text_and_predicate(name: str) -> None:
    selection, expected = SELECTIONS[name]
    assert names(selection) == expected


def test_parameters_are_selected_by_module_and_by_themselves() -> None:
    model = Tied()
    assert names(model.decoder, model) == ["encoder.weight", "decoder.bias"]
    assert names(model.twice, model) == ["middle.weight", "middle.bias"]
    assert names(model, model) == NAMES
    assert names(model.gain, model) == ["gain"]
    assert names([model.gain, model.middle], model) == ["gain", "middle.weight", "middle.bias"]
    assert names(model.encoder.parameters(), model) == ["encoder.weight", "encoder.bias"]
    assert names(dict(model.encoder.named_parameters(prefix="encoder")), model) == [
        "encoder.weight",
        "encoder.bias",
    ]


def test_a_generator_selects_the_same_for_every_product() -> None:
    model = Tied()
    H = HessianOperator(model, nn.MSELoss(), DATA, params=model.middle.parameters())
    assert H.shape == (12, 12)
    v = random(12)
    assert torch.equal(H @ v, H @ v)
    assert H.linearize().is_current()


def test_a_selected_operator_is_that_block_of_the_hessian() -> None:
    model = Tied()
    whole = HessianOperator(model, nn.MSELoss(), DATA)
    sizes = dict(zip(whole.layout.names, map(torch.Size.numel, whole.layout.shapes), strict=True))
    dense = whole.to_dense()
    for selection, expected in SELECTIONS.values():
        if not isinstance(selection, str | list):
            continue
        H = HessianOperator(model, nn.MSELoss(), DATA, params=selection)
        picked = torch.cat([torch.full((n,), name in expected) for name, n in sizes.items()])
        block = dense[picked][:, picked]
        assert torch.allclose(H.to_dense(), block, rtol=1e-12, atol=1e-14)
        assert torch.allclose(H.linearize().to_dense(), block, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_do_not_count_however_they_are_selected() -> None:
    model = Tied()
    model.middle.requires_grad_(False)
    assert names(None, model) == ["gain", "encoder.weight", "encoder.bias", "decoder.bias"]
    assert names("*.bias", model) == ["encoder.bias", "decoder.bias"]
    assert names(model, model) == names(None, model)
    with pytest.raises(ValueError, match=r"params='middle\.\*' matches no trainable parameter"):
        names("middle.*", model)


def test_a_selection_follows_the_model() -> None:
    """Selected by name and by module: a parameter replaced later still counts."""
    model = Tied()
    by_name = HessianOperator(model, nn.MSELoss(), DATA, params="middle.*")
    by_module = HessianOperator(model, nn.MSELoss(), DATA, params=model.middle)
    model.middle.weight = nn.Parameter(2 * model.middle.weight.detach())
    fresh = HessianOperator(model, nn.MSELoss(), DATA, params="middle.*").to_dense()
    assert torch.equal(by_name.to_dense(), fresh)
    assert torch.equal(by_module.to_dense(), fresh)


def test_a_parameter_selected_by_itself_and_then_replaced_is_told() -> None:
    model = Tied()
    H = HessianOperator(model, nn.MSELoss(), DATA, params=model.gain)
    model.gain = nn.Parameter(2 * model.gain.detach())
    with pytest.raises(ValueError, match="params=<Parameter> matches no trainable parameter"):
        H @ torch.ones(1, dtype=torch.float64)


def test_a_wrapped_module_selects_as_the_module_does() -> None:
    model = Tied()
    assert names(nn.DataParallel(model.middle), model) == ["middle.weight", "middle.bias"]
    wrapped = nn.DataParallel(model)
    assert names("middle.*", wrapped) == ["middle.weight", "middle.bias"]
    assert names(wrapped.module.middle, wrapped) == ["middle.weight", "middle.bias"]


def test_parameters_of_the_loss_have_names_of_their_own() -> None:
    risk = EmpiricalRisk(Tied(), Scaled(), DATA)
    assert list(risk.parameters()) == [*NAMES, "loss.scale"]
    assert list(EmpiricalRisk(Tied(), Scaled(), DATA, params="loss.*").parameters()) == [
        "loss.scale"
    ]


def test_the_layout_is_that_of_parameters_to_vector() -> None:
    model = Tied()
    H = HessianOperator(model, nn.MSELoss(), DATA)
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    pieces = H.layout.unflatten(vector.detach()[None])
    assert all(torch.equal(pieces[name][0], p) for name, p in model.named_parameters())
