"""What a model holds and does: masks, statistics, modes, gradients, penalties, ties, hooks."""

from __future__ import annotations

import copy
import pickle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import HessianOperator, Identity
from hvpop.solvers import cg

from .problems import EXACT, dense_hessian, error, labelled, mlp, random, truth, vector

LOSS = nn.CrossEntropyLoss()


def noisy() -> nn.Sequential:
    """Return a network with dropout that takes half."""
    return nn.Sequential(mlp(4, 6, 6), nn.Dropout(0.5), nn.Tanh(), mlp(6, 4, 3))


def normalized() -> nn.Sequential:
    """Return a network with a batch norm whose running statistics are far from any batch's."""
    norm = nn.BatchNorm1d(6, dtype=torch.float64)
    model = nn.Sequential(mlp(4, 6, 6), norm, nn.Tanh(), mlp(6, 4, 3))
    norm.running_mean += 1.0
    norm.running_var *= 4.0
    return model


def test_dropout_has_one_mask_for_an_operator() -> None:
    model, data = noisy(), [labelled()]
    u, v = random(2, len(vector(model)))
    H = HessianOperator(model, LOSS, data, seed=1)
    Hu, Hv = H @ u, H @ v
    assert torch.equal(H @ v, Hv)
    assert abs(u @ Hv - v @ Hu) < EXACT * u.norm() * Hv.norm()
    assert error(HessianOperator(model, LOSS, data, seed=2) @ v, Hv) > 0.1


def test_a_system_with_dropout_can_be_solved() -> None:
    model = noisy()
    H, b = HessianOperator(model, LOSS, [labelled()]), vector(model)
    A = H @ H + 0.1 * Identity.like(H)
    assert error(A @ cg(A, b, rtol=1e-9).x, b) < 1e-8


def test_batch_statistics_are_those_of_train_mode_and_leave_the_running_ones() -> None:
    model, (x, y) = normalized(), labelled()
    v, before = vector(model), copy.deepcopy(model.state_dict())
    Hv = HessianOperator(model, LOSS, [(x, y)]) @ v
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    twin = copy.deepcopy(model)
    assert error(Hv, truth(twin, x, y) @ v) < EXACT
    assert error(Hv, truth(twin.eval(), x, y) @ v) > 0.5


def test_modes_and_gradients_stay_as_they_were() -> None:
    model, data = noisy(), [labelled()]
    model[0].eval()
    modes = [m.training for m in model.modules()]
    first, *rest = model.parameters()
    first.grad = torch.ones_like(first)
    grad = first.grad
    H = HessianOperator(model, LOSS, data)
    v = vector(model)
    assert (H @ v).grad_fn is None
    assert (H.linearize() @ v).grad_fn is None
    assert [m.training for m in model.modules()] == modes
    assert first.grad is grad
    assert torch.equal(grad, torch.ones_like(first))
    assert all(p.grad is None for p in rest)


def test_updated_running_statistics_are_noticed() -> None:
    model, (x, y) = normalized().eval(), labelled()
    H, v = HessianOperator(model, LOSS, [(x, y)]), vector(model)
    A = H.linearize()
    old = A @ v
    model.train()(random(8, 4, seed=9))
    model.eval()
    assert not A.is_current()
    assert torch.equal(A @ v, old)
    assert error(H @ v, truth(model, x, y) @ v) < EXACT
    assert error(old, H @ v) > 1e-3


def test_a_penalty_on_the_parameters_inside_the_loss_counts() -> None:
    model, (x, y) = mlp(), labelled()
    v, held = vector(model), list(model.parameters())

    def penalized(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + sum(p.square().sum() for p in model.parameters())

    def by_list(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + sum(p.square().sum() for p in held)  # made before the call

    expected = truth(model, x, y) @ v + 2 * v
    for loss in (penalized, by_list):
        H = HessianOperator(model, loss, [(x, y)])
        assert error(H @ v, expected) < EXACT
        assert error(H.linearize() @ v, expected) < EXACT


class Tempered(nn.Module):
    """Cross entropy at a temperature that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z * self.log_temperature.exp(), t)


def test_parameters_of_the_loss_count() -> None:
    model, loss, (x, y) = mlp(), Tempered(), labelled()
    H = HessianOperator(model, loss, [(x, y)])
    assert H.layout.names[-1] == "loss.log_temperature"
    both = nn.ModuleList([model, loss])
    v = vector(both)
    expected = dense_hessian(both, lambda: loss(model(x), y)) @ v
    assert error(H @ v, expected) < EXACT
    assert error((H @ v)[:-1], truth(model, x, y, loss) @ v[:-1]) > 1e-3  # the coupling counts too


class TwiceRegistered(nn.Module):
    """Knows one layer by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = mlp(4, 4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_layer_registered_twice_stays_the_optimizers() -> None:
    model, (x, y) = TwiceRegistered(), labelled()
    v, parameters = vector(model), list(model.parameters())
    H = HessianOperator(model, LOSS, [(x, y)])
    assert error(H @ v, truth(model, x, y) @ v) < EXACT
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(isinstance(p, nn.Parameter) for p in model.b.parameters())


def test_what_a_forward_hook_stores_is_an_ordinary_tensor() -> None:
    model, data, stored = mlp(), [labelled()], []
    model[0].register_forward_hook(lambda module, inputs, output: stored.append(output))
    v = vector(model)
    H = HessianOperator(model, LOSS, data)
    assert error(H @ v, truth(model, *data[0]) @ v) < EXACT
    kept = stored[0].detach()  # hooks do run
    assert pickle.loads(pickle.dumps(kept)).shape == (23, 5)
    assert kept.numpy().shape == (23, 5)
    assert kept.data_ptr()
