"""Other libraries, each called as its documentation says, and double backward written by hand."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from entrants import Entrant, Product, loop
from torch import Tensor
from workloads import Workload, gauss_newton


class NotInstalledError(ImportError):
    """A peer that this environment does not have."""


def imported(module: str) -> Any:
    """A peer's module; its own warnings are its own business."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise NotInstalledError(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _quiet(build: Callable[..., Product]) -> Callable[..., Product]:
    @wraps(build)
    def quietly(*args: Any, **how: Any) -> Product:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(*args, **how)

    return quietly


# -- pyDVL -----------------------------------------------------------------------------------------


@_quiet
def pydvl_kept(workload: Workload) -> Product:
    return _pydvl(workload, precompute_grad=True)


@_quiet
def pydvl_reverse(workload: Workload) -> Product:
    return _pydvl(workload, precompute_grad=False, reverse_only=True)


@_quiet
def pydvl_forward(workload: Workload) -> Product:
    return _pydvl(workload, precompute_grad=False, reverse_only=False)


def _pydvl(workload: Workload, **how: bool) -> Product:
    functional = imported("pydvl.influence.torch.functional")
    f = functional.create_hvp_function(workload.fresh(), workload.loss, workload.data, **how)

    def vector(v: Tensor) -> Tensor:
        return f(v).reshape(-1)

    if how["precompute_grad"]:
        return Product(vector, lambda V: f(V.T).T)
    return Product(vector, loop(vector))


# -- curvlinops ------------------------------------------------------------------------------------


@_quiet
def curvlinops(workload: Workload, kind: str = "HessianLinearOperator") -> Product:
    model = workload.fresh()
    H = getattr(imported("curvlinops"), kind)(
        model, workload.loss, list(model.parameters()), workload.data, check_deterministic=False
    )
    return Product(lambda v: H @ v, lambda V: H @ V, scipy=H.to_scipy(), own=H)


# -- hessian-eigenthings ---------------------------------------------------------------------------


@_quiet
def eigenthings(workload: Workload) -> Product:
    library = imported("hessian_eigenthings")
    H = library.HessianOperator(
        workload.fresh(), workload.data, library.supervised_loss(workload.loss)
    )
    return Product(H.matvec, loop(H.matvec), own=H)


# -- PyHessian -------------------------------------------------------------------------------------


@_quiet
def pyhessian(workload: Workload) -> Product:
    model = workload.fresh()
    h = imported("pyhessian").hessian(model, workload.loss, dataloader=workload.data, cuda=False)

    def vector(v: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that backward(create_graph=True) leaks
            return flat(h.dataloader_hv_product(shaped(v, list(model.parameters())))[1])

    return Product(vector, loop(vector), own=h)


# -- by hand ---------------------------------------------------------------------------------------


def by_hand(workload: Workload) -> Product:
    model = workload.fresh()
    parameters = list(model.parameters())

    def vector(v: Tensor) -> Tensor:
        pieces = shaped(v, parameters)
        total, samples = torch.zeros_like(v), 0
        for x, y in workload.data:
            g = torch.autograd.grad(workload.loss(model(x), y), parameters, create_graph=True)
            total.add_(flat(torch.autograd.grad(g, parameters, pieces)), alpha=len(x))
            samples += len(x)
        return total.div_(samples)

    return Product(vector, loop(vector))


def by_hand_kept(workload: Workload) -> Product:
    model = workload.fresh()
    parameters = list(model.parameters())
    gradients = [
        (torch.autograd.grad(workload.loss(model(x), y), parameters, create_graph=True), len(x))
        for x, y in workload.data
    ]
    samples = sum(n for _, n in gradients)

    def vector(v: Tensor) -> Tensor:
        pieces = shaped(v, parameters)
        total = torch.zeros_like(v)
        for g, n in gradients:
            product = torch.autograd.grad(g, parameters, pieces, retain_graph=True)
            total.add_(flat(product), alpha=n)
        return total.div_(samples)

    return Product(vector, loop(vector))


@_quiet
def gauss_newton_by_hand(workload: Workload) -> Product:
    """As `gauss_newton` of workloads has it, its graphs kept."""
    model, samples = workload.fresh(), sum(len(x) for x, _ in workload.data)
    maps = [(gauss_newton(model, workload.loss, x, y), len(x)) for x, y in workload.data]

    def vector(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for multiply, n in maps:
            total.add_(multiply(v), alpha=n)
        return total.div_(samples)

    return Product(vector, loop(vector))


def gradient(workload: Workload) -> Callable[[], Tensor]:
    """The unit of cost: the gradient of all the data by a plain loop."""
    model = workload.fresh()
    parameters = list(model.parameters())

    def full() -> Tensor:
        total, samples = torch.zeros(workload.parameters), 0
        for x, y in workload.data:
            g = torch.autograd.grad(workload.loss(model(x), y), parameters)
            total.add_(flat(g), alpha=len(x))
            samples += len(x)
        return total.div_(samples)

    return full


def shaped(v: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    pieces = v.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


PEERS = (
    Entrant("pyDVL, graphs kept", True, pydvl_kept),
    Entrant("pyDVL, reverse", False, pydvl_reverse),
    Entrant("pyDVL, forward", False, pydvl_forward),
    Entrant("curvlinops", False, curvlinops),
    Entrant("hessian-eigenthings", False, eigenthings),
    Entrant("PyHessian", False, pyhessian),
    Entrant("by hand, graphs kept", True, by_hand_kept),
    Entrant("by hand", False, by_hand),
)

GAUSS_NEWTON = (
    Entrant("curvlinops", False, partial(curvlinops, kind="GGNLinearOperator")),
    Entrant("by hand, graphs kept", True, gauss_newton_by_hand),
)
