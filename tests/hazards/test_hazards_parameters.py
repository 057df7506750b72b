"""Every way of changing parameters is noticed, whether or not autograd's versions tell.

A linearized operator stays at its point and says that it is no longer current; the live one follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hvpop import HessianOperator

from .problems import EXACT, error, labelled, mlp, truth, vector

Model = nn.Sequential
Update = Callable[[Model], Any]


def stepped(kind: type[torch.optim.Optimizer], **settings: Any) -> Update:
    """Return an update by one step of an optimizer."""

    def update(model: Model) -> None:
        optimizer = kind(model.parameters(), lr=0.3, **settings)
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
        optimizer.zero_grad()

    return update


def moved(model: Model) -> dict[str, Tensor]:
    return {name: 0.7 * t for name, t in model.state_dict().items()}


def in_place(model: Model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)


def in_inference_mode(model: Model) -> None:
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(0.7)


def through_an_alias(model: Model) -> None:
    for p in model.parameters():
        p.detach().sub_(0.3 * p.detach())


def reset(model: Model) -> None:
    with torch.random.fork_rng():
        for layer in (model[0], model[2]):
            layer.reset_parameters()


def data_added_to(model: Model) -> None:
    for p in model.parameters():
        p.data.add_(p.data, alpha=-0.3)


def data_copied_over(model: Model) -> None:
    for p in model.parameters():
        p.data.copy_(0.7 * p.data)


def signs_flipped(model: Model) -> None:
    model[2].weight.data.neg_()


def through_numpy(model: Model) -> None:
    for p in model.parameters():
        array = p.detach().numpy()
        np.multiply(array, 0.7, out=array)


def data_replaced(model: Model) -> None:
    for p in model.parameters():
        p.data = 0.7 * p.data


def from_a_vector(model: Model) -> None:
    vector_to_parameters(
        0.7 * parameters_to_vector(model.parameters()).detach(), model.parameters()
    )


def replaced(model: Model) -> None:
    model[0].weight = nn.Parameter(0.7 * model[0].weight.detach())


def storage_set(model: Model) -> None:
    for p in model.parameters():
        with torch.no_grad():
            p.set_(0.7 * p.detach())


def cast_and_back(model: Model) -> None:
    model.float().double()


def check_noticed(update: Update, moves: float = 1e-2) -> None:
    """Check what both operators say after an update that changes the product by more than ``moves``."""
    model, (x, y) = mlp(), labelled()
    v = vector(model)
    H = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    A = H.linearize()
    old = A @ v
    assert error(old, truth(model, x, y) @ v) < EXACT
    assert A.is_current()
    update(model)
    new = truth(model, x, y) @ v
    assert error(old, new) > moves
    assert not A.is_current()
    assert torch.equal(A @ v, old)  # neither garbage nor half of each
    assert error(H @ v, new) < EXACT
    assert H.linearize().is_current()


def bare_autograd(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products at the old and at the new point, and that of a graph kept between them."""
    model, (x, y) = mlp(), labelled()
    v = vector(model)
    old = truth(model, x, y) @ v
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    update(model)
    flat = parameters_to_vector(gradient)
    kept = parameters_to_vector(torch.autograd.grad(flat, parameters, v))
    return old, truth(model, x, y) @ v, kept


@pytest.mark.parametrize(
    "update",
    [
        stepped(torch.optim.SGD, foreach=False),
        stepped(torch.optim.Adam, foreach=True),
        lambda model: model.load_state_dict(moved(model)),
        in_place,
        through_an_alias,
        in_inference_mode,
    ],
    ids=["sgd", "foreach_adam", "load_state_dict", "in_place", "alias", "inference_mode"],
)
def test_a_step_that_versions_tell_is_followed_without_an_error(update: Update) -> None:
    check_noticed(update)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        bare_autograd(update)


def test_reset_layers_are_noticed() -> None:
    check_noticed(reset)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_step_is_noticed_although_no_version_tells(kind: Any) -> None:
    update = stepped(kind, fused=True)
    check_noticed(update)
    old, new, kept = bare_autograd(
        update
    )  # no error there, and neither the old nor the new product
    assert error(kept, old) > 1e-3
    assert error(kept, new) > 1e-3


@pytest.mark.parametrize("update", [data_added_to, data_copied_over, signs_flipped, through_numpy])
def test_a_write_past_autograd_is_noticed_although_no_version_tells(update: Update) -> None:
    check_noticed(update)
    old, new, kept = bare_autograd(update)
    assert error(kept, old) > 1e-3
    assert error(kept, new) > 1e-3


@pytest.mark.parametrize("update", [data_replaced, from_a_vector])
def test_data_put_in_place_of_the_old_is_noticed(update: Update) -> None:
    check_noticed(update)
    old, new, kept = bare_autograd(update)
    assert error(kept, old) < EXACT  # stale, without an error
    assert error(kept, new) > 1e-2


@pytest.mark.parametrize(
    "update",
    [lambda model: model.load_state_dict(moved(model), assign=True), replaced],
    ids=["load_state_dict", "attribute"],
)
def test_new_parameters_in_the_old_places_are_noticed(update: Update) -> None:
    check_noticed(update)


@pytest.mark.parametrize(("update", "moves"), [(storage_set, 1e-2), (cast_and_back, 1e-9)])
def test_other_storage_behind_a_parameter_is_followed_without_an_error(
    update: Update, moves: float
) -> None:
    check_noticed(update, moves)
