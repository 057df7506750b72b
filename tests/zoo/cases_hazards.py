"""Cases: stop-gradients, state written in the forward, losses that close over things, odd callers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import SIZES, classification, mlp, regression
from .reference import finite_difference
from .registry import Problem, case

# -- where gradients are stopped: the convention is that of double backward -----------------------


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = mlp(4, 5, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale(x).exp().detach()


class DetachedItself(Detached):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * out.exp().detach()


class NoGradTarget(Detached):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.body(x + 1)
        return self.body(x) - 0.9 * target


class DataAttribute(Detached):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.body[0].weight.data.norm()


class StraightThrough(Detached):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body[0](x))
        return self.body[2](h + (h.sign() - h).detach())


class FakeQuantized(Detached):
    def forward(self, x: Tensor) -> Tensor:
        w = self.body[0].weight
        w = w + (torch.round(w * 8) / 8 - w).detach()
        return self.body[2](torch.tanh(F.linear(x, w)))


class VectorQuantized(Detached):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body[0](x))
        nearest = (h.detach().unsqueeze(1) - self.codes.detach()).square().sum(-1).argmin(1)
        code = self.codes[nearest]
        return self.body[2](h + (code - h).detach()) + (h.detach() - code).square().mean()


for _kind in (
    Detached, DetachedItself, NoGradTarget, DataAttribute, StraightThrough, FakeQuantized,
    VectorQuantized,
):  # fmt: skip
    case(f"stopped_{_kind.__name__.lower()}", reference="double backward")(
        lambda kind=_kind: Problem(kind(), regression(4), nn.MSELoss())
    )


@case("detached_in_closed_form")
def detached_in_closed_form() -> Problem:
    """``mean(w a.detach() x)^2``: the gradient field ``(w, a) -> (2 w a^2 m, 0)`` gives ``2 a^2 m``."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * self.a.detach() * x

    data = [(x, torch.zeros_like(x)) for x, _ in regression(1)]
    moment = torch.cat([x for x, _ in data]).square().mean()
    rows = torch.stack([2 * 1.3**2 * moment, torch.zeros(())])
    return Problem(Product(), data, nn.MSELoss(), expected=lambda v: rows * v)


# -- losses of teacher and student, with a target network -----------------------------------------


@case("temporal_difference", reference="double backward")
def temporal_difference() -> Problem:
    data = [(torch.randn(b, 4), torch.randn(b, 4), torch.randn(b)) for b in SIZES]

    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        now, later, reward = batch
        with torch.no_grad():
            target = reward + 0.9 * model(later).amax(1)
        return F.smooth_l1_loss(model(now)[:, 0], target)

    return Problem(mlp(), data, batch_loss=batch_loss)


@case("distillation_from_a_frozen_teacher")
def distillation_from_a_frozen_teacher() -> Problem:
    student = mlp()
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(torch.randn_like(p))

    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch[0]).softmax(1)
        return F.kl_div(model(batch[0]).log_softmax(1), wanted, reduction="batchmean")

    return Problem(student, regression(4), batch_loss=batch_loss)


# -- losses that close over parameters ------------------------------------------------------------


def penalised(read: Callable[[nn.Module], Callable[[], list[Tensor]]]) -> Problem:
    """Return a regression whose loss adds a penalty on parameters that ``read`` finds."""
    model = mlp(4, 5, 2)
    parameters = read(model)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) + 0.1 * sum(
            (p.square().sum() for p in parameters()), torch.zeros((), dtype=outputs.dtype)
        )

    return Problem(model, regression(4), loss)


def by_layer(model: nn.Module) -> Callable[[], list[Tensor]]:
    assert isinstance(model, nn.Sequential)
    return lambda: [model[0].weight, model[2].weight]


case("penalty_reads_the_model")(lambda: penalised(lambda m: lambda: list(m.parameters())))
case("penalty_reads_layers")(lambda: penalised(by_layer))


def kept_list(model: nn.Module) -> Callable[[], list[Tensor]]:
    kept: list[Tensor] = list(model.parameters())
    return lambda: kept


case("penalty_reads_a_list_made_before")(lambda: penalised(kept_list))
case("penalty_reads_a_state_dict")(
    lambda: penalised(lambda m: lambda: list(m.state_dict(keep_vars=True).values()))
)


@case("penalty_to_the_power_of_a_half")
def penalty_to_the_power_of_a_half() -> Problem:
    model = mlp(4, 5, 2)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        norm = torch.cat([p.flatten() for p in model.parameters()]).norm()
        return F.mse_loss(outputs, targets) + norm

    return Problem(model, regression(4), loss)


@case("elastic_weight_consolidation")
def elastic_weight_consolidation() -> Problem:
    model = mlp(4, 5, 2)
    anchor = {name: p.detach() + 0.1 for name, p in model.named_parameters()}

    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pull = [(p - anchor[name]).pow(4).sum() for name, p in model.named_parameters()]
        return F.mse_loss(model(batch[0]), batch[1]) + torch.stack(pull).sum()

    return Problem(model, regression(4), batch_loss=batch_loss)


@case("criterion_with_parameters")
def criterion_with_parameters() -> Problem:
    class Uncertain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.randn(2))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            errors = (outputs - targets).square().mean(0)
            return (errors * (-self.log_scale).exp() + self.log_scale).sum()

    return Problem(mlp(4, 5, 2), regression(4), Uncertain())


@case("criterion_with_parameters_closed_over")
def criterion_with_parameters_closed_over() -> Problem:
    criterion = nn.Bilinear(2, 2, 1)
    for p in criterion.parameters():
        p.requires_grad_(False)
    return Problem(
        mlp(4, 5, 2), regression(4), lambda o, y: criterion(o, y).square().mean() + o.exp().mean()
    )


# -- state that the forward writes ----------------------------------------------------------------


class RunningMean(nn.Module):
    """Centres by a running mean that it updates by an assignment."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(4, 5, 2)
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        result = (out - self.mean).sin()
        self.update(out.detach().mean(0))
        return result

    def update(self, mean: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.calls += 1


class RunningInPlace(RunningMean):
    def update(self, mean: Tensor) -> None:
        self.mean.lerp_(mean, 0.1)
        self.calls.add_(1)


class RunningByData(RunningMean):
    def update(self, mean: Tensor) -> None:
        self.mean.data.copy_(mean)


class UnsavedBuffer(RunningMean):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(2), persistent=False)


for _kind2 in (RunningMean, RunningInPlace, RunningByData, UnsavedBuffer):
    case(f"buffer_{_kind2.__name__.lower()}")(
        lambda kind=_kind2: Problem(kind(), regression(4), nn.MSELoss())
    )


@case("module_switches_its_own_mode")
def module_switches_its_own_mode() -> Problem:
    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + (1.0 if self.training else 0.0)

    model = Switching()
    model.body[1].eval()
    return Problem(model, regression(4), nn.MSELoss())


# -- callers --------------------------------------------------------------------------------------


def plain() -> Problem:
    return Problem(mlp(4, 5, 2), regression(4), nn.MSELoss())


def single() -> Problem:
    """Return a float32 problem, whose truth is that of its float64 twin."""
    twin = plain()
    data = [(x.float(), y.float()) for x, y in twin.data]
    exact = Problem(twin.model, [(x.double(), y.double()) for x, y in data], nn.MSELoss())
    model = copy.deepcopy(twin.model).float()
    twin.model.load_state_dict(model.state_dict())
    return Problem(
        model, data, nn.MSELoss(), expected=lambda v: finite_difference(exact, v.double()).product
    )


def under_autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


case("caller_under_no_grad", caller=torch.no_grad)(plain)
case("caller_under_inference_mode", caller=torch.inference_mode)(plain)
case("caller_under_autocast", caller=under_autocast, tolerance=2e-5, agreement=2e-6)(single)
case("caller_detects_anomalies", caller=torch.autograd.detect_anomaly, warns="Anomaly")(plain)


@case("caller_under_no_grad_with_gradient_inside", caller=torch.no_grad)
def caller_under_no_grad_with_gradient_inside() -> Problem:
    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].detach().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().mean()

    return Problem(mlp(4, 5, 2), regression(4), batch_loss=batch_loss)


@case("batches_made_in_inference_mode")
def batches_made_in_inference_mode() -> Problem:
    ordinary = plain()
    with torch.inference_mode():
        data = [(x.clone(), y.clone()) for x, y in ordinary.data]
    return Problem(
        ordinary.model,
        data,
        ordinary.loss,
        expected=lambda v: finite_difference(ordinary, v).product,
    )


@case("batches_that_require_gradients")
def batches_that_require_gradients() -> Problem:
    problem = plain()
    for x, _ in problem.data:
        x.requires_grad_()
    return problem


@case("batch_of_one")
def batch_of_one() -> Problem:
    problem = plain()
    x, y = problem.data[1]
    return Problem(problem.model, [problem.data[0], (x[:1], y[:1])], problem.loss)


@case("three_ragged_batches")
def three_ragged_batches() -> Problem:
    data = [(torch.randn(b, 4), torch.randint(3, (b,))) for b in (5, 2, 3)]
    return Problem(mlp(), data, nn.CrossEntropyLoss())


@case("model_in_eval_mode")
def model_in_eval_mode() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    return Problem(model.eval(), regression(4), nn.MSELoss())


# -- inputs and outputs of any form ---------------------------------------------------------------


class TwoTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.left(left)) * self.right(right).exp()


@case("two_inputs")
def two_inputs() -> Problem:
    data = [((torch.randn(b, 3), torch.randn(b, 2)), torch.randn(b, 4)) for b in SIZES]
    return Problem(TwoTower(), data, nn.MSELoss())


@case("inputs_by_name")
def inputs_by_name() -> Problem:
    data = [
        ({"right": torch.randn(b, 2), "left": torch.randn(b, 3)}, torch.randn(b, 4)) for b in SIZES
    ]
    return Problem(TwoTower(), data, nn.MSELoss())


@case("nested_batches")
def nested_batches() -> Problem:
    def batch_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        out = model(*batch["views"]["both"])
        return F.mse_loss(out, batch["y"][0]) * batch["scale"]

    data = [
        {
            "views": {"both": [torch.randn(b, 3), torch.randn(b, 2)]},
            "y": (torch.randn(b, 4), "ignored"),
            "scale": 2.0,
        }
        for b in SIZES
    ]
    return Problem(TwoTower(), data, batch_loss=batch_loss, weights=[6, 4])


@case("outputs_in_a_dictionary")
def outputs_in_a_dictionary() -> Problem:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.value, self.kind = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            h = torch.tanh(self.body(x))
            return {"value": self.value(h), "kinds": [self.kind(h)]}

    def loss(outputs: dict[str, Any], targets: tuple[Tensor, Tensor]) -> Tensor:
        kinds = F.cross_entropy(outputs["kinds"][0], targets[1])
        return F.mse_loss(outputs["value"], targets[0]) + kinds

    data = [(torch.randn(b, 4), (torch.randn(b, 1), torch.randint(3, (b,)))) for b in SIZES]
    return Problem(Heads(), data, loss)


@case("class_targets_and_sample_weights")
def class_targets_and_sample_weights() -> Problem:
    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, w = batch
        return (F.cross_entropy(model(x), y, reduction="none") * w).mean()

    data = [(x, y, torch.rand(len(y))) for x, y in classification(4)]
    return Problem(mlp(), data, batch_loss=batch_loss)


# -- values that are not finite -------------------------------------------------------------------


@case("loss_is_not_finite", refused="(?i)finite|nan")
def loss_is_not_finite() -> Problem:
    problem = plain()
    problem.data[1][0][0, 0] = torch.nan
    return problem


@case("norm_at_zero", refused="(?i)finite|nan")
def norm_at_zero() -> Problem:
    """The second derivative of a norm does not exist at zero."""
    model = nn.Linear(4, 2)
    nn.init.zeros_(model.weight)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) + model.weight.norm()

    return Problem(model, regression(4), loss)


@case("no_trainable_parameter", refused="(?i)requires_grad|trainable")
def no_trainable_parameter() -> Problem:
    return Problem(mlp(4, 5, 2).requires_grad_(False), regression(4), nn.MSELoss())


@case("loss_is_a_number", refused="(?i)tensor")
def loss_is_a_number() -> Problem:
    return Problem(mlp(4, 5, 2), regression(4), lambda o, y: F.mse_loss(o, y).item())


@case("reduction_sum_under_a_mean", refused="(?i)reduction|sum")
def reduction_sum_under_a_mean() -> Problem:
    return Problem(mlp(4, 5, 2), regression(4), nn.MSELoss(reduction="sum"))
