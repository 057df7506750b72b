"""Cases: every activation between two linear layers; kinked ones at points off their kinks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import Apply, classification, regression
from .registry import Problem, case

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "relu_inplace": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "rrelu_eval": lambda: nn.RReLU().eval(),
    "prelu": nn.PReLU,
    "prelu_per_channel": lambda: nn.PReLU(6),
    "elu": lambda: nn.ELU(0.7),
    "elu_inplace": lambda: nn.ELU(inplace=True),
    "celu": lambda: nn.CELU(0.7),
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu_inplace": lambda: nn.SiLU(inplace=True),
    "mish": nn.Mish,
    "softplus": lambda: nn.Softplus(2.0),
    "softsign": nn.Softsign,
    "softshrink": lambda: nn.Softshrink(0.1),
    "hardshrink": lambda: nn.Hardshrink(0.1),
    "tanhshrink": nn.Tanhshrink,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.5),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "log_sigmoid": nn.LogSigmoid,
    "threshold": lambda: nn.Threshold(0.1, 0.2),
    "softmax": lambda: nn.Softmax(dim=1),
    "softmin": lambda: nn.Softmin(dim=1),
    "log_softmax": lambda: nn.LogSoftmax(dim=-1),
    "softmax2d": lambda: nn.Sequential(nn.Unflatten(1, (3, 2, 1)), nn.Softmax2d(), nn.Flatten()),
    "glu": lambda: nn.Sequential(nn.GLU(), Apply(lambda x: torch.cat([x, x * x], 1))),
    "maxout": lambda: Apply(lambda x: x.view(-1, 3, 2).amax(-1).repeat(1, 2)),
    "swiglu": lambda: Apply(lambda x: (F.silu(x[:, :3]) * x[:, 3:]).repeat(1, 2)),
    "geglu": lambda: Apply(lambda x: (F.gelu(x[:, :3]) * x[:, 3:]).repeat(1, 2)),
    "sine": lambda: Apply(lambda x: torch.sin(3 * x)),
    "squared_relu": lambda: Apply(lambda x: F.relu(x) ** 2),
    "snake": lambda: Apply(lambda x: x + torch.sin(x) ** 2),
    "absolute": lambda: Apply(torch.abs),
    "clamp": lambda: Apply(lambda x: x.clamp(-0.4, 0.6)),
    "quick_gelu": lambda: Apply(lambda x: x * torch.sigmoid(1.702 * x)),
    "logsumexp": lambda: Apply(lambda x: torch.cat([x, x.logsumexp(1, keepdim=True)], 1)[:, 1:]),
}


def between(make: Callable[[], nn.Module]) -> Problem:
    """Return a regression with the activation between two linear layers."""
    model = nn.Sequential(nn.Linear(4, 6), make(), nn.Linear(6, 2))
    return Problem(model, regression(4), nn.MSELoss())


for _name, _make in ACTIVATIONS.items():
    case(_name)(partial(between, _make))


@case("adaptive_softmax")
def adaptive_softmax() -> Problem:
    def batch_loss(model: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return model["tail"](torch.tanh(model["body"](x)), y).loss

    tail = nn.AdaptiveLogSoftmaxWithLoss(4, 7, cutoffs=[3], div_value=2.0)
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "tail": tail})
    return Problem(model, classification(3, classes=7), batch_loss=batch_loss)


@case("learned_slope")
def learned_slope() -> Problem:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.tensor(1.3))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    return between(Swish)


case("rrelu_train", reference="laws")(partial(between, nn.RReLU))
case("gumbel_softmax", reference="laws")(
    partial(between, lambda: Apply(lambda x: F.gumbel_softmax(x, tau=0.7)))
)
for _kind in (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout):
    case(f"{_kind.__name__.lower()}_train", reference="laws")(
        partial(between, lambda kind=_kind: nn.Sequential(nn.Tanh(), kind(0.3)))
    )
    case(f"{_kind.__name__.lower()}_eval")(
        partial(between, lambda kind=_kind: nn.Sequential(nn.Tanh(), kind(0.3)).eval())
    )
case("gaussian_noise", reference="laws")(
    partial(between, lambda: Apply(lambda x: torch.tanh(x + 0.1 * torch.randn_like(x))))
)
