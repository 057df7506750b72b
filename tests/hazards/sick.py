"""Operators that are silently wrong, each in a way that some library or some user's code is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp
from torch.utils.checkpoint import checkpoint

from hvpop import HessianOperator, HVPStrategy
from hvpop.strategies import LinearMap, Params
from tests.functions import CubeOnce, SavedSine, SineByNumpy

from .problems import Apply, classes, labelled, mlp, random

Function = Callable[[Params], Tensor]
Product = Callable[[Params], Params]


class By(HVPStrategy):
    """A strategy from a function ``(f, point) -> (v -> product)``."""

    def __init__(self, transform: Callable[[Function, Params], Product]) -> None:
        self.transform = transform

    def linearize(
        self, fn: Any, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        return _Map(self.transform(lambda p: fn(p, *args), params))


class _Map(LinearMap):
    def __init__(self, product: Product) -> None:
        self.product = product

    def __call__(self, v: Params) -> Params:
        return {name: t.detach() for name, t in self.product(v).items()}


def jvp_of_jacrev(f: Function, p: Params) -> Product:
    return lambda v: jvp(jacrev(f), (p,), (v,))[1]


def grad_of_jvp(f: Function, p: Params) -> Product:
    return lambda v: grad(lambda q: jvp(f, (q,), (v,))[1])(p)


def backward_twice(f: Function, p: Params) -> Product:
    leaves = {n: t.detach().requires_grad_() for n, t in p.items()}
    gradient = torch.autograd.grad(f(leaves), list(leaves.values()), create_graph=True)

    def product(v: Params) -> Params:
        found = torch.autograd.grad(gradient, list(leaves.values()), list(v.values()), True)
        return dict(zip(p, found, strict=True))

    return product


def dual_without_graph(f: Function, p: Params) -> Product:
    def product(v: Params) -> Params:
        with forward_ad.dual_level():
            leaves = {n: t.detach().requires_grad_() for n, t in p.items()}
            dual = {n: forward_ad.make_dual(t, v[n]) for n, t in leaves.items()}
            found = torch.autograd.grad(f(dual), list(dual.values()))
            tangents = [forward_ad.unpack_dual(g).tangent for g in found]
        return {
            n: torch.zeros_like(t) if tangent is None else tangent
            for (n, t), tangent in zip(p.items(), tangents, strict=True)
        }

    return product


class Later(_Map):
    """Right at the first product only, as graphs of `torch.func.linearize` that write to constants."""

    def __call__(self, v: Params) -> Params:
        product, self.product = super().__call__(v), lambda v: v
        return product


def first_only(f: Function, p: Params) -> Product:
    def exact(v: Params) -> Params:
        leaves = {n: t.detach().requires_grad_() for n, t in p.items()}
        g = torch.autograd.grad(f(leaves), list(leaves.values()), create_graph=True)
        rows = torch.autograd.grad(g, list(leaves.values()), list(v.values()))
        return dict(zip(p, rows, strict=True))

    return Later(exact)


class Reentrant(nn.Module):
    """A checkpoint of the old kind around a body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(4, 5, 4), mlp(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = x.detach().requires_grad_()  # which old checkpoints need
        return self.head(checkpoint(self.body, start, use_reentrant=True))


class Padded(nn.Module):
    """An embedding whose padding row is not zero, and is used."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 4, padding_idx=0, dtype=torch.float64)
        self.head = mlp()
        with torch.no_grad():
            self.rows.weight.copy_(random(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.rows(x)).mean(1))


def around(layer: nn.Module | Callable[[Tensor], Tensor]) -> nn.Sequential:
    """Return a network with a layer of width 6 inside."""
    inside = layer if isinstance(layer, nn.Module) else Apply(layer)
    return nn.Sequential(mlp(4, 6, 6), inside, nn.Tanh(), mlp(6, 4, 3))


def operator(model: nn.Module, **settings: Any) -> HessianOperator:
    return HessianOperator(model, nn.CrossEntropyLoss(), [labelled()], **settings)


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(x)
    return x * scale


def straight_through(x: Tensor) -> Tensor:
    return torch.tanh(x) + (x.round() - torch.tanh(x)).detach()


def fresh_masks() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return around(lambda x: x * torch.empty_like(x).bernoulli_(0.5, generator=generator))


def weight_normed() -> nn.Module:
    layer = nn.Linear(6, 6, dtype=torch.float64)
    return around(nn.utils.parametrizations.weight_norm(layer))


def solved(x: Tensor) -> Tensor:
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(eye + x.mT @ x / len(x), x.mT).mT


def scripted() -> nn.Module:
    model = torch.jit.script(mlp())
    x, y = labelled()
    for _ in range(2):  # as after a training step
        nn.functional.cross_entropy(model(x), y).backward()
    model.zero_grad()
    return model


def padded() -> HessianOperator:
    x = classes(9, 5, of=7)
    x[:, 0] = 0
    return HessianOperator(Padded(), nn.CrossEntropyLoss(), [(x, classes(9))])


class Random:
    """Batches with noise of their own at every pass."""

    def __iter__(self) -> Any:
        x, y = labelled()
        generator = torch.Generator()
        generator.seed()
        yield x + torch.randn(x.shape, generator=generator, dtype=x.dtype), y


def layer_norm() -> nn.Module:
    return around(nn.LayerNorm(6, dtype=torch.float64))


SICK: dict[str, tuple[Callable[[], HessianOperator], str]] = {
    "jvp(jacrev) through LayerNorm": (
        lambda: operator(layer_norm(), strategy=By(jvp_of_jacrev)),
        "finite differences",
    ),
    "grad(jvp) through LayerNorm": (
        lambda: operator(layer_norm(), strategy=By(grad_of_jvp)),
        "finite differences",
    ),
    "right at the first product only": (
        lambda: operator(mlp(), strategy=By(first_only)),
        "finite differences",
    ),
    "forward mode without a graph": (
        lambda: operator(around(solved), strategy=By(dual_without_graph)),
        "finite differences",
    ),
    "saved derivative": (
        lambda: operator(around(SavedSine.apply), strategy=By(backward_twice)),
        "finite differences",
    ),
    "derivative by numpy": (
        lambda: operator(around(SineByNumpy.apply), strategy=By(backward_twice)),
        "finite differences",
    ),
    "once_differentiable": (lambda: operator(around(CubeOnce.apply)), "once_differentiable"),
    "detach": (lambda: operator(around(lambda x: x * x.detach().cos())), "finite differences"),
    "no_grad": (lambda: operator(around(without_grad)), "finite differences"),
    "straight-through": (lambda: operator(around(straight_through)), "finite differences"),
    "padding row": (padded, "finite differences"),
    "fresh dropout masks": (lambda: operator(fresh_masks()), "determinism"),
    "data drawn anew": (
        lambda: HessianOperator(mlp(), nn.CrossEntropyLoss(), Random()),
        "gave other batches",
    ),
}
"""Name -> what makes the operator, and a word of the finding."""
