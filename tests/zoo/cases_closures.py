"""Cases: losses that close over parameters, and state that the forward writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import mlp, regression
from .registry import Problem, case


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


# -- state that the forward writes -----------------------------------------------------------------


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
