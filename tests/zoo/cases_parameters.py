"""Cases: parameters tied, shared, frozen, unused, scalar, of several dtypes, in containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import Apply, mlp, regression
from .reference import finite_difference
from .registry import Problem, case


class Net(nn.Module):
    """A base for networks of four inputs: hidden and head are there to be used or not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.other.weight = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sin(self.other(x)))


class TiedTransposed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.hidden(x).tanh(), self.hidden.weight.T))


class TwiceRegistered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"first": self.hidden, "second": self.hidden})

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.encoder["second"](x).sin())


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.hidden(x).sin())


class TwiceInOneModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.alias)


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Linear(2, 2)


class UsedInOneBatch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.sometimes = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.sometimes(x).exp() if len(x) > 5 else x)


class LinearOnly(Net):
    def __init__(self) -> None:
        super().__init__()
        self.price = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().sum(1, keepdim=True) + self.price


class Scalars(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.power = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x).exp() ** self.power


class EmptyParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3))


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden.weight.requires_grad_(False)
        self.head.bias.requires_grad_(False)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
        self.biases = nn.ParameterDict({"a": torch.randn(4), "b": torch.randn(4)})
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        for w, b in zip(self.weights, self.biases.values(), strict=True):
            x = torch.tanh(x @ w + b)
        for layer in self.layers:
            x = layer(x).sin()
        return x


class NonContiguous(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden.weight = nn.Parameter(torch.randn(4, 8)[:, ::2].T)


class ViewsOfOneParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(4 * 3 + 3 * 2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.flat.split([12, 6])
        return torch.tanh(x @ first.view(4, 3)) @ second.view(3, 2)


class Lora(Net):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x) + x @ self.down @ self.up))


class Hypernetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.code, self.maker = nn.Parameter(torch.randn(3)), nn.Linear(3, 4 * 3 + 3 * 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.maker(self.code).split([12, 6])
        return torch.tanh(x @ first.view(4, 3)) @ second.view(3, 2)


class HypernetworkByCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(2, 8)
        object.__setattr__(self, "shell", nn.Linear(4, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(x[:, :2].mean(0)).view(2, 4)
        return torch.func.functional_call(self.shell, {"weight": weight}, (x,)).tanh()


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([mlp(4, 3, 2) for _ in range(2)])
        object.__setattr__(self, "shell", mlp(4, 3, 2).to("meta"))

    def forward(self, x: Tensor) -> Tensor:
        stacked, _ = self.stack()
        return torch.func.vmap(self.one, (0, None))(stacked, x).mean(0)

    def stack(self) -> tuple[dict[str, Tensor], None]:
        states = [dict(member.named_parameters()) for member in self.members]
        return {name: torch.stack([s[name] for s in states]) for name in states[0]}, None

    def one(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(self.shell, params, (x,))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
        self.body(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class OwnParameterClass(nn.Module):
    class Angle(nn.Parameter):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.angle = self.Angle(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.angle.sin()


class ReadByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        named = dict(self.named_parameters())
        state = list(self.parameters())
        return (x @ named["hidden.weight"].T).tanh() @ state[2].T + self.head.bias


class Cached(Net):
    """Keeps a plain attribute that aliases a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = [self.hidden]  # not registered a second time

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.groups[0](x).sin())


NETS: list[type[nn.Module]] = [
    TiedWeights, TiedTransposed, TwiceRegistered, CalledTwice, TwiceInOneModule, Unused,
    UsedInOneBatch, LinearOnly, Scalars, EmptyParameter, Frozen, Lists, NonContiguous,
    ViewsOfOneParameter, Lora, Hypernetwork, HypernetworkByCall, Ensemble, Lazy,
    OwnParameterClass, ReadByName, Cached,
]  # fmt: skip


def named(kind: type[nn.Module]) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in kind.__name__)[1:]


for _kind in NETS:
    case(named(_kind))(lambda kind=_kind: Problem(kind(), regression(4), nn.MSELoss()))


@case("all_linear")
def all_linear() -> Problem:
    def batch_loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).mean()

    return Problem(nn.Linear(4, 2), regression(4), batch_loss=batch_loss, expected=torch.zeros_like)


@case("quadratic_in_closed_form")
def quadratic_in_closed_form() -> Problem:
    data = regression(4, outputs=(1,))
    gram = sum((x.T @ x for x, _ in data), torch.zeros(4, 4)) * 2 / 10
    model = nn.Linear(4, 1, bias=False)
    return Problem(model, data, nn.MSELoss(), expected=lambda v: gram @ v)


@case("softmax_regression_in_closed_form")
def softmax_regression_in_closed_form() -> Problem:
    data = [(x, torch.arange(len(x)) % 3) for x, _ in regression(4)]
    model = nn.Linear(4, 3, bias=False)

    def product(v: Tensor) -> Tensor:
        x = torch.cat([inputs for inputs, _ in data])
        p = (x @ model.weight.detach().T).softmax(1)
        u = x @ v.view(3, 4).T
        return ((p * u - p * (p * u).sum(1, keepdim=True)).T @ x).flatten() / len(x)

    return Problem(model, data, nn.CrossEntropyLoss(), expected=product)


Cast = Callable[[nn.Module], nn.Module]


def in_precision(cast: Cast, *, casts_data: bool = False) -> Problem:
    """Return a network of lower precision, whose truth is that of its float64 twin."""

    class Casting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in self:
                dtypes = [p.dtype for p in module.parameters()]
                x = module(x.to(dtypes[0]) if dtypes else x)
            return x.double()

    model, data = Casting(*mlp(4, 5, 2)), regression(4)
    rounded = cast(model)
    twin = Casting(*mlp(4, 5, 2)).double()
    twin.load_state_dict(rounded.state_dict())
    if casts_data:
        data = [(x.float(), y) for x, y in data]
    plain = Problem(twin, data, nn.MSELoss())
    return Problem(
        rounded, data, nn.MSELoss(), expected=lambda v: finite_difference(plain, v.double()).product
    )


def half_single(model: nn.Module) -> nn.Module:
    assert isinstance(model, nn.Sequential)
    model[0].float()
    return model


case("mixed_precision_parameters", tolerance=2e-5, agreement=2e-6)(
    lambda: in_precision(half_single)
)
case("single_precision", tolerance=2e-5, agreement=2e-6)(
    lambda: in_precision(lambda model: model.float(), casts_data=True)
)
case("half_precision_b", tolerance=5e-2, agreement=5e-2, warns="accurate to")(
    lambda: in_precision(lambda model: model.bfloat16(), casts_data=True)
)


@case("complex_parameters", refused="complex")
def complex_parameters() -> Problem:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x.to(self.phase.dtype) @ self.phase).abs().square().tanh())

    return Problem(Wave(), regression(4), nn.MSELoss())


@case("complex_views_of_real_parameters")
def complex_views_of_real_parameters() -> Problem:
    """What the refusal of complex parameters recommends; the vectors' parts begin at odd places."""

    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))
            self.phase = nn.Parameter(torch.randn(4, 3, 2))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            phase = torch.view_as_complex(self.phase)
            return self.head(self.scale * (x.to(phase.dtype) @ phase).abs().square().tanh())

    return Problem(Wave(), regression(4), nn.MSELoss())


@case("model_is_its_own_parameters", total=True)
def model_is_its_own_parameters() -> Problem:
    """A loss that reads no data but the size of its batch."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            rosenbrock = 10 * (self.x[1:] - self.x[:-1] ** 2) ** 2 + (1 - self.x[:-1]) ** 2
            return rosenbrock.sum() * len(x)

    data = regression(1)
    return Problem(Point(), data, lambda output, _: output)


case("apply_without_parameters_around")(
    lambda: Problem(nn.Sequential(Apply(torch.sin), mlp(4, 4, 2)), regression(4), nn.MSELoss())
)
