"""Gauss-Newton is J' B J, for every split of the data and every loss that says what its outputs are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import cg
from torch import Tensor, nn

from hvpop import (
    TOTAL,
    Compiled,
    EmpiricalRisk,
    FiniteDifference,
    ForwardOverReverse,
    GaussNewtonOperator,
    HessianOperator,
    Identity,
    ReverseOverReverse,
    outputs,
)
from hvpop.curvature.gauss_newton import cross_entropy_hessian
from hvpop.marker import Cutting
from hvpop.risk.terms import noting
from hvpop.strategies import Params
from hvpop.strategies.parted import Parted
from hvpop.strategies.through_outputs import loss_hessian

from .problems import classes, error, mlp, random, set_parameters, split

EXACT = 1e-12  # some hundred operations in float64
DIFFERENCE = 1e-7  # central differences of outputs: eps**(2/3), and a third derivative

STRATEGIES = pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [
        (ReverseOverReverse(), EXACT),
        (ForwardOverReverse(), EXACT),
        (Compiled(compiler=False), EXACT),
        (FiniteDifference(), DIFFERENCE),
    ],
    ids=repr,
)

X, LABELS = random(23, 4, seed=1), classes(23, seed=2)
IGNORED = LABELS.masked_fill(torch.arange(23) % 5 == 0, -100)
BITS = (random(23, 3, seed=3) > 0).double()
REAL = random(23, 3, seed=4)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "ignored targets": (nn.CrossEntropyLoss(), IGNORED),
    "both": (nn.CrossEntropyLoss(weight=WEIGHTS), IGNORED),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "mse": (nn.MSELoss(), REAL),
    "huber": (nn.HuberLoss(delta=0.7), REAL),
    "bce with pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), BITS),
    "poisson": (nn.PoissonNLLLoss(), REAL.exp()),
}
SIZES = (9, 9, 5)


class Normed(nn.Module):
    """Convolution, normalisation and attention in one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 3, 2)
        self.norm = nn.LayerNorm(3)
        self.attend = nn.MultiheadAttention(3, 1, batch_first=True)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x[:, None]).mT)
        h = self.attend(h, h, h, need_weights=False)[0]
        result: Tensor = self.last(torch.relu(h).mean(1))
        return result


def normed() -> nn.Module:
    return set_parameters(Normed().double())


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "normed": normed}


def gauss_newton(model: nn.Module, loss: nn.Module, targets: Tensor, **options: Any) -> Any:
    data = split((X, targets), SIZES)
    return GaussNewtonOperator(model, loss, data, **options)


def dense(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], targets: Tensor) -> Tensor:
    """``J' B J`` of all data as one batch, by rows of J and double backward of the loss alone."""
    parameters = list(model.parameters())
    z = model(X)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(e, parameters, retain_graph=True)])
        for e in z.flatten()
    ]
    J = torch.stack(rows)
    flat = z.detach().flatten().requires_grad_()
    (g,) = torch.autograd.grad(loss(flat.view_as(z), targets), flat, create_graph=True)
    B = torch.stack([torch.autograd.grad(e, flat, retain_graph=True)[0] for e in g])
    return J.mT @ B @ J


# --- the matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_jacobian_around_the_hessian_of_the_loss(name: str, kind: str) -> None:
    model, (loss, targets) = MODELS[kind](), LOSSES[name]
    G, truth = gauss_newton(model, loss, targets), dense(MODELS[kind](), loss, targets)
    assert error(G.to_dense(), truth) < EXACT
    assert error(G.linearize().to_dense(), truth) < EXACT
    values = torch.linalg.eigvalsh(G.to_dense())
    assert values[0] > -EXACT * values[-1]  # these losses are convex in the outputs


@STRATEGIES
@pytest.mark.parametrize("linearized", [False, True])
def test_every_strategy_gives_it(strategy: Any, tolerance: float, linearized: bool) -> None:
    model, (loss, targets) = normed(), LOSSES["both"]
    G = gauss_newton(model, loss, targets, strategy=copy.copy(strategy))
    A = G.linearize() if linearized else G
    V = random(A.shape[1], 9, seed=5)
    truth = dense(model, loss, targets) @ V
    assert error(A @ V, truth) < tolerance
    assert error(A @ V[:, 0], truth[:, 0]) < tolerance
    assert error(A.T @ V, truth) < tolerance


@given(cuts=st.lists(st.integers(1, 22), max_size=6, unique=True), name=st.sampled_from([*LOSSES]))
def test_no_split_into_batches_changes_it(cuts: list[int], name: str) -> None:
    ends = [0, *sorted(cuts), 23]
    sizes = [b - a for a, b in pairwise(ends)]
    model, (loss, targets) = mlp(), LOSSES[name]
    if any(bool((t < 0).all()) for t in targets.split(sizes)) and targets is IGNORED:
        return  # a batch of ignored targets alone has no mean
    v = random(43, seed=6)
    G = GaussNewtonOperator(model, loss, split((X, targets), sizes))
    whole = GaussNewtonOperator(model, loss, [(X, targets)])
    assert error(G @ v, whole @ v) < EXACT
    assert error(G.linearize() @ v, whole @ v) < EXACT


@pytest.mark.parametrize("name", LOSSES)
def test_of_a_model_linear_in_its_parameters_it_is_the_hessian(name: str) -> None:
    model, (loss, targets) = set_parameters(nn.Linear(4, 3).double()), LOSSES[name]
    H = HessianOperator(model, loss, split((X, targets), SIZES))
    assert error(gauss_newton(model, loss, targets).to_dense(), H.to_dense()) < EXACT


def test_a_loss_that_is_not_convex_in_its_outputs_keeps_its_negative_curvature() -> None:
    model = mlp()

    def sine(z: Tensor, t: Tensor) -> Tensor:
        return (z * t).sin().mean()

    G = GaussNewtonOperator(model, sine, [(X, REAL)])
    truth = dense(model, sine, REAL)
    assert torch.linalg.eigvalsh(truth)[0] < -1e-3
    assert error(G.to_dense(), truth) < EXACT


def test_totals_and_batch_statistics_are_those_of_the_batches() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    set_parameters(model)
    before = copy.deepcopy(model.state_dict())
    loss = nn.MSELoss(reduction="sum")
    G = GaussNewtonOperator(model, loss, [(X, REAL)], average=TOTAL)
    truth = dense(copy.deepcopy(model), loss, REAL)
    assert error(G.to_dense(), truth) < EXACT
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --- what an operator is besides ----------------------------------------------------------------------


def test_it_has_blocks_checks_forms_and_goes_through_scipy() -> None:
    model, (loss, targets) = mlp(), LOSSES["both"]
    G, truth = gauss_newton(model, loss, targets), dense(mlp(), loss, targets)
    rows, cols = slice(0, 25), slice(25, 43)
    assert error(G.block("0.*").to_dense(), truth[rows, rows]) < EXACT
    assert error(G.block("0.*", "2.*").to_dense(), truth[rows, cols]) < EXACT
    head = gauss_newton(model, loss, targets, params="2.*")
    assert error(head.to_dense(), truth[cols, cols]) < EXACT
    assert G.check(batches=None).verdict == "healthy"
    assert "finite differences of outputs" in str(G.check())
    A = G.linearize() + 0.1 * Identity.like(G)
    b = random(43, seed=7)
    x, info = cg(A, b.numpy(), rtol=1e-10)
    assert info == 0
    assert error(A @ torch.from_numpy(x), b) < 1e-9
    assert repr(G) == "<43x43 GaussNewtonOperator float64 cpu>"
    assert repr(G.linearize()) == "<43x43 LinearizedGaussNewton float64 cpu>"


def test_a_linearized_one_keeps_its_point_and_is_copied() -> None:
    model, (loss, targets) = mlp(), LOSSES["cross entropy"]
    A = gauss_newton(model, loss, targets).linearize()
    v = random(43, seed=8)
    expected = A @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert not A.is_current()
    assert torch.equal(A @ v, expected)
    assert error(pickle.loads(pickle.dumps(A)) @ v, expected) < EXACT


def test_nothing_of_the_users_changes() -> None:
    model, (loss, targets) = mlp(), LOSSES["cross entropy"]
    loss(model(X), targets).backward()
    before = [
        (p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None
    ]
    state = torch.get_rng_state()
    G = gauss_newton(model, loss, targets)
    G @ random(43)
    G.linearize() @ random(43)
    after = [(p, p.grad) for p in model.parameters()]
    assert all(
        torch.equal(p, q) and torch.equal(g, h)
        for (p, g), (q, h) in zip(before, after, strict=True)
    )
    assert torch.equal(state, torch.get_rng_state())


# --- where outputs are ----------------------------------------------------------------------------


def marked(model: nn.Module, batch: Any) -> Tensor:
    x, t = batch
    return F.cross_entropy(outputs({"logits": model(x)})["logits"], t)


def unmarked(model: nn.Module, batch: Any) -> Tensor:
    x, t = batch
    return F.cross_entropy(model(x), t)


def penalized(model: nn.Module, batch: Any) -> Tensor:
    return marked(model, batch) + 1e-2 * sum(p.square().sum() for p in model.parameters())


def chained(model: nn.Module, batch: Any) -> Tensor:
    x, t = batch
    first = outputs(model[0](x))
    return F.cross_entropy(outputs(model[1:](first)), t)


def risk(batch_loss: Any, model: nn.Module | None = None) -> EmpiricalRisk:
    data = split((X, LABELS), SIZES)
    return EmpiricalRisk.from_batch_loss(model or mlp(), batch_loss, data)


def test_a_batch_loss_marks_them_in_any_container() -> None:
    G = GaussNewtonOperator.from_risk(risk(marked))
    assert error(G.to_dense(), dense(mlp(), nn.CrossEntropyLoss(), LABELS)) < EXACT


@pytest.mark.parametrize(
    ("batch_loss", "words"),
    [
        (unmarked, r"loss\(hvpop\.outputs\(model\(x\)\), y\)"),
        (penalized, "reaches 0.weight, 0.bias, 2.weight past the outputs"),
        (chained, "of which one is computed from another"),
    ],
)
def test_what_cannot_be_parted_is_told(batch_loss: Any, words: str) -> None:
    A = GaussNewtonOperator.from_risk(risk(batch_loss))
    with pytest.raises(ValueError, match=words):
        A @ random(43)
    with pytest.raises(ValueError, match=words):
        A.linearize() @ random(43)


def test_the_mark_is_the_identity_otherwise() -> None:
    z = random(3)
    assert outputs(z) is z
    H, plain = HessianOperator.from_risk(risk(marked)), HessianOperator.from_risk(risk(unmarked))
    v = random(43)
    assert torch.equal(H @ v, plain @ v)


class Headed(nn.Module):
    """A model that computes its own loss, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.body(x)
        return type("Output", (), {"loss": F.cross_entropy(logits, labels), "logits": logits})()


def test_the_head_of_a_model_marks_its_logits() -> None:
    from hvpop.risk import hugging_face

    data = [{"x": x, "labels": t} for x, t in split((X, IGNORED), SIZES)]
    G = GaussNewtonOperator.from_risk(EmpiricalRisk.from_batch_loss(Headed(), hugging_face(), data))
    assert error(G.to_dense(), dense(mlp(), nn.CrossEntropyLoss(), IGNORED)) < EXACT


# -- cross entropy ---------------------------------------------------------------------------------


CLOSED: dict[str, tuple[nn.Module, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "both": (nn.CrossEntropyLoss(weight=WEIGHTS), IGNORED),
    "sum": (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), IGNORED),
}
OPEN: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "probabilities": (nn.CrossEntropyLoss(), REAL.softmax(1)),
    "a multiple": (lambda z, y: 0.5 * F.cross_entropy(z, y), LABELS),
    "a power": (lambda z, y: F.cross_entropy(z, y) ** 2, LABELS),
    "and more": (lambda z, y: F.cross_entropy(z, y) + z.square().mean(), LABELS),
    "of a function": (lambda z, y: F.cross_entropy(z * 2, y), LABELS),
    "no mean": (lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), LABELS),
}


def parted(loss: Callable[..., Tensor], z: Tensor, y: Tensor) -> Parted:
    """A loss whose outputs are the parameters."""

    def function(params: Params, y: Tensor) -> Tensor:
        with noting():
            return loss(outputs(1.0 * params["z"]), y)

    return Parted(function, {"z": z}, (y,), cutting=Cutting(watching=True))


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("tokens", [None, 4])
def test_of_a_cross_entropy_the_hessian_in_the_outputs_is_known(
    name: str, tokens: int | None
) -> None:
    loss, y = CLOSED[name]
    z, s = random(23, 3, seed=6), random(23, 3, seed=7)
    if tokens:  # classes come second
        z, s = (torch.stack([t + i for i in range(tokens)], 2) for t in (z, s))
        y = torch.stack([y] * tokens, 1)
    at = parted(loss, z, y)
    closed = cross_entropy_hessian(at)
    assert closed is not None
    (found,), (truth,) = closed([s], None), loss_hessian(at)([s], None)
    assert float((found - truth).norm()) <= EXACT * float(truth.norm())
    (columns,) = closed([torch.stack([s, 2 * s])], 2)
    assert float((columns[1] - 2 * truth).norm()) <= EXACT * float(truth.norm())


def test_of_a_single_sample_it_is_known_too() -> None:
    at = parted(nn.CrossEntropyLoss(), random(3), torch.tensor(1))
    closed = cross_entropy_hessian(at)
    assert closed is not None
    s = random(3, seed=1)
    torch.testing.assert_close(closed([s], None)[0], loss_hessian(at)([s], None)[0])


@pytest.mark.parametrize("name", OPEN)
def test_of_what_is_not_just_a_cross_entropy_it_is_differentiated(name: str) -> None:
    loss, y = OPEN[name]
    assert cross_entropy_hessian(parted(loss, REAL, y)) is None


def test_a_penalty_beside_a_cross_entropy_is_refused_all_the_same() -> None:
    model = mlp()

    def batch_loss(model: nn.Module, batch: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(outputs(model(batch[0])), batch[1]) + penalty

    risk = EmpiricalRisk.from_batch_loss(model, batch_loss, [(X, LABELS)])
    with pytest.raises(ValueError, match="past the outputs of the model"):
        GaussNewtonOperator.from_risk(risk) @ random(43)


class DifferentiatedInside(nn.Module):
    """A model that differentiates, transforms or hooks what it computes, in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.last = way, nn.Linear(4, 5), nn.Linear(5, 3)

    def field(self, x: Tensor) -> Tensor:
        return self.last(F.layer_norm(self.first(x), (5,)).tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "autograd":
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.field(x).square().sum(), x, create_graph=True)
            return slope[:, :3]
        if self.way == "jacobian":
            return (
                torch.autograd.functional.jacobian(  # type: ignore[no-any-return]
                    lambda x: self.field(x).sum(0), x, create_graph=True
                )
                .sum(-1)
                .T
            )
        if self.way == "grad":
            return torch.func.vmap(torch.func.grad(lambda x: self.field(x).sum()))(x)[:, :3]
        if self.way == "vmap":
            return torch.func.vmap(self.field)(x)  # type: ignore[no-any-return]
        h = self.first(x)
        h.register_hook(lambda g: None)
        return self.last(h.tanh())


@pytest.mark.parametrize("strategy", [None, ReverseOverReverse(), FiniteDifference()])
@pytest.mark.parametrize("way", ["autograd", "jacobian", "grad", "vmap", "hook"])
def test_models_that_differentiate_inside_have_the_same_product_live_as_ever(
    way: str, strategy: Any
) -> None:
    model, target = DifferentiatedInside(way).double(), random(6, 3, seed=4)
    x, v = random(6, 4, seed=5), random(43)
    G = GaussNewtonOperator(model, nn.MSELoss(), [(x, target)], strategy=strategy)
    truth = dense_at(model, x) @ v
    tolerance = DIFFERENCE if isinstance(strategy, FiniteDifference) else EXACT
    for _ in range(3):  # graphs at first, dual numbers once these are known to be right
        assert error(G @ v, truth) < tolerance
    assert error(G.linearize() @ v, truth) < tolerance


def dense_at(model: nn.Module, x: Tensor) -> Tensor:
    """``J' B J`` of a mean square, whose B is ``2 / entries``."""
    parameters = list(model.parameters())
    rows = []
    for z in model(x).reshape(-1):
        found = torch.autograd.grad(z, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    J = torch.stack(rows)
    return 2 / len(J) * J.T @ J


def test_complex_outputs_are_told_to_be_taken_apart() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_complex(self.layer(x).reshape(-1, 2, 2))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z.abs() - y).square().mean()

    data = [(random(5, 3), random(5, 2, seed=1))]
    with pytest.raises(ValueError, match=r"let it return torch.view_as_real\(z\)"):
        GaussNewtonOperator(Complex().double(), loss, data) @ random(16)
