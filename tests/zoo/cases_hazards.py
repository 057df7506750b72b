"""Cases: odd callers, batches of any form, values that are not finite, refusals."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import SIZES, classification, mlp, regression
from .reference import finite_difference
from .registry import Problem, case


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
case(
    "caller_detects_anomalies",
    caller=torch.autograd.detect_anomaly,
    warns="Anomaly Detection|Error detected",
)(plain)


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


# -- inputs and outputs of any form ----------------------------------------------------------------


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


# -- values that are not finite --------------------------------------------------------------------


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
