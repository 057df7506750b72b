"""A live operator follows the model on every route of change; a linearized one stays and knows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import HessianOperator, Identity

from .problems import Scaled, error, mlp, random, regression, set_parameters, split

TIGHT = 1e-12
DATA = split(regression(), (10, 10, 3))
Route = Callable[[nn.Module], Any]


def hessian(model: nn.Module, data: Any = DATA, **settings: Any) -> HessianOperator:
    return HessianOperator(model, nn.MSELoss(), data, **settings)


def fresh(model: nn.Module) -> Tensor:
    """Return the dense Hessian of a copy, which nothing can be stale of."""
    return hessian(copy.deepcopy(model)).to_dense()


# -- every way to change a parameter ---------------------------------------------------------------


def step(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Route:
    def take(model: nn.Module) -> None:
        trained = list(model.parameters())
        for p in trained:
            p.grad = torch.ones_like(p)
        make(trained, lr=0.1, **settings).step()
        model.zero_grad()

    return take


def under(mode: Any) -> Route:
    def write(model: nn.Module) -> None:
        with mode():
            model[0].weight.mul_(1.5)

    return write


def loaded(**settings: Any) -> Route:
    def load(model: nn.Module) -> None:
        state = {k: 1.5 * v for k, v in model.state_dict().items()}
        model.load_state_dict(state, **settings)

    return load


def from_vector(model: nn.Module) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(1.5 * vector, model.parameters())


def new_storage(model: nn.Module) -> None:
    model[0].weight.data = 1.5 * model[0].weight.data


def through_numpy(model: nn.Module) -> None:
    model[0].weight.detach().numpy()[...] *= 1.5


def new_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(1.5 * model[0].weight.detach())


def new_module(model: nn.Module) -> None:
    model[0] = set_parameters(nn.Linear(4, 5).double(), seed=5)


ROUTES: dict[str, Route] = {
    "SGD": step(torch.optim.SGD),
    "SGD foreach": step(torch.optim.SGD, foreach=True),
    "SGD fused": step(torch.optim.SGD, fused=True),
    "Adam fused": step(torch.optim.Adam, fused=True),
    "AdamW": step(torch.optim.AdamW),
    "no_grad": under(torch.no_grad),
    "inference_mode": under(torch.inference_mode),
    "detached": lambda model: model[0].weight.detach().mul_(1.5),
    "data copied": lambda model: model[0].weight.data.copy_(2 * model[0].weight.data),
    "data scaled": lambda model: model[0].weight.data.mul_(1.5),
    "data negated": lambda model: model[0].weight.data.neg_(),
    "data permuted": lambda model: model[0].weight.data.copy_(model[0].weight.data.flip(0)),
    "data replaced": new_storage,
    "numpy": through_numpy,
    "vector": from_vector,
    "load_state_dict": loaded(),
    "load_state_dict assign": loaded(assign=True),
    "new parameter": new_parameter,
    "new module": new_module,
    "another dtype and back": lambda model: model.float().double(),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_live_operator_follows_and_a_linearized_one_stays(route: str) -> None:
    model = mlp()
    H = hessian(model)
    before = H.to_dense()
    kept, again = H.linearize(), H.linearize(memory=0)  # one keeps graphs, one evaluates anew
    assert error(kept.to_dense(), before) < TIGHT
    assert kept.is_current()
    assert again.is_current()
    ROUTES[route](model)
    assert error(H.to_dense(), fresh(model)) < TIGHT
    assert error(H.to_dense(), before) > 1e-9
    assert error(kept.to_dense(), before) < TIGHT
    assert not kept.is_current()
    assert not again.is_current()
    if route != "new module":  # of a module that is gone there is nothing to evaluate
        assert error(again.to_dense(), before) < TIGHT
    assert H.linearize().is_current()
    assert error(H.linearize().to_dense(), fresh(model)) < TIGHT


def test_products_and_training_do_not_disturb_each_other() -> None:
    model = mlp()
    H, optimizer = hessian(model), torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
    v = random(H.shape[1])
    for x, y in DATA:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        product = H @ v  # between the forward and the backward pass
        loss.backward()
        assert error(product, fresh(model) @ v) < TIGHT
        optimizer.step()
        assert error(H @ v, fresh(model) @ v) < TIGHT


# -- what else a Hessian depends on -----------------------------------------------------------------


def with_buffers() -> nn.Sequential:
    """Return a model with BatchNorm in eval mode, a frozen layer and something random."""
    model = nn.Sequential(
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, 4),
        nn.Dropout(0.4),
        nn.Linear(4, 3),
    )
    set_parameters(model.double()).eval()
    model[1].running_mean.copy_(random(5, seed=20))
    model[1].running_var.copy_(random(5, seed=21).abs() + 0.5)
    model[3].requires_grad_(False)
    return model


def statistics(model: nn.Module) -> None:
    """Move the running statistics by a forward pass in training mode."""
    model.train()
    with torch.no_grad():
        model(random(30, 4, seed=30))
    model.eval()


STATE_ROUTES: dict[str, Route] = {
    "running statistics": statistics,
    "buffer in place": lambda model: model[1].running_var.mul_(2),
    "buffer data": lambda model: model[1].running_var.data.mul_(2),
    "buffer numpy": lambda model: model[1].running_mean.numpy().__iadd__(1.0),
    "new buffer": lambda model: setattr(model[1], "running_var", 2 * model[1].running_var),
    "buffer reset": lambda model: model[1].reset_running_stats(),
    "loaded": loaded(),
    "frozen weight": lambda model: model[3].weight.mul_(2),
    "frozen data": lambda model: model[3].weight.data.neg_(),
}


@pytest.mark.parametrize("route", STATE_ROUTES)
def test_buffers_and_frozen_parameters_are_followed_and_frozen_too(route: str) -> None:
    model = with_buffers()
    H = hessian(model)
    before = H.to_dense()
    kept, again = H.linearize(), H.linearize(memory=0)
    assert error(kept.to_dense(), before) < TIGHT
    assert again.is_current()
    STATE_ROUTES[route](model)
    assert error(H.to_dense(), fresh(model)) < TIGHT
    assert error(H.to_dense(), before) > 1e-6
    for A in (kept, again):
        assert error(A.to_dense(), before) < TIGHT
        assert not A.is_current()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory", [0, None])
def test_a_linearized_operator_stays_in_train_or_eval_mode(training: bool, memory: Any) -> None:
    model = with_buffers().train(training)
    H = hessian(model)
    before = H.to_dense()
    A, used = H.linearize(memory=memory), H.linearize(memory=memory)
    assert error(used.to_dense(), before) < TIGHT
    model.train(not training)
    assert error(A.to_dense(), before) < TIGHT  # prepares only now
    assert error(used.to_dense(), before) < TIGHT
    assert error(H.to_dense(), before) > 1e-6
    assert model.training is not training
    assert all(module.training is not training for module in model)


def test_parameters_of_the_loss_are_followed_too() -> None:
    model, loss = mlp(), Scaled()
    H = HessianOperator(model, loss, DATA)
    assert H.layout.names[-1] == "loss.scale"
    A = H.linearize()
    v = random(H.shape[1])
    before = A @ v
    loss.scale.data.mul_(2)
    assert not A.is_current()
    assert error(A @ v, before) < TIGHT
    assert error(H @ v, HessianOperator(model, copy.deepcopy(loss), DATA) @ v) < TIGHT


# -- copies and composites --------------------------------------------------------------------------


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))]
)
def test_operators_can_be_copied_and_pickled(copied: Callable[[Any], Any], used: bool) -> None:
    H = hessian(mlp())
    A = H.linearize()
    v = random(H.shape[1])
    expected = H @ v
    if used:
        A @ v
    assert error(copied(H) @ v, expected) < TIGHT
    assert error(copied(A) @ v, expected) < TIGHT
    assert A.is_current()


def test_a_composite_is_current_as_long_as_its_parts_are() -> None:
    model = mlp()
    H = hessian(model)
    A = (H + 0.1 * Identity.like(H)).linearize()
    assert A.is_current()
    model[0].weight.data.mul_(2)
    assert not A.is_current()


def test_a_linearized_operator_linearizes_to_itself() -> None:
    A = hessian(mlp()).linearize()
    assert A.linearize() is A
