"""Cases: gradients that are stopped on the way; the convention is that of double backward."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import SIZES, mlp, regression
from .registry import Problem, case


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
    """The gradient field ``(w, a) -> (2 w a^2 m, 0)`` has the derivative ``2 a^2 m`` along w."""

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


# -- losses of teacher and student, with a target network ------------------------------------------


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
