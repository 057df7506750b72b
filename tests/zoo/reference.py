"""The truth: fourth-order differences of ``backward()``, trusting no second derivative."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .registry import Problem

STEP = 5e-5  # of the larger difference, relative to the norm of the parameters


@dataclass(frozen=True)
class Difference:
    """A product found by differences, and how far two step sizes are apart."""

    product: Tensor  # (n,)
    error: float  # relative


def finite_difference(problem: Problem, v: Tensor, *, total: bool = False) -> Difference:
    """Return ``H v``, v of shape (n,), from six gradients along v.

    ``(8 (g(h) - g(-h)) - (g(2h) - g(-2h))) / 12h`` for a step and for its half. The two differ by
    about fifteen times the truncation error of the better one, and by a kink if there is one.
    """
    point = [p.detach().clone() for p in problem.parameters()]
    length = max(1.0, _flat(point).norm().item())
    half = 0.5 * STEP * length / v.norm().item()

    def slope(step: float) -> Tensor:
        return (gradient_at(step) - gradient_at(-step)) / step

    def gradient_at(step: float) -> Tensor:
        _write(problem, point, step, v)
        return gradient(problem, total=total)

    try:
        one, two, four = slope(half), slope(2 * half), slope(4 * half)
    finally:
        _write(problem, point, 0.0, v)
    fine, coarse = (8 * one - 2 * two) / 12, (8 * two - 2 * four) / 12
    return Difference(fine, ((fine - coarse).norm() / (fine.norm() + 1e-12)).item())


def gradient(problem: Problem, *, total: bool = False) -> Tensor:
    """Return the gradient (n,) of the mean over the batches (of their sum: ``total``)."""
    parameters = problem.parameters()
    weights = [1.0] * len(problem.data) if total else problem.batch_weights()
    result = torch.zeros_like(_flat(parameters))
    for weight, batch in zip(weights, problem.data, strict=True):
        with buffers_restored(problem.model):
            for p in parameters:
                p.grad = None
            loss = problem.value(batch)
            if loss.requires_grad:
                loss.backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            result += weight * _flat(grads)
            for p in parameters:
                p.grad = None
    return result if total else result / sum(weights)


def double_backward(problem: Problem, v: Tensor, *, total: bool = False) -> Tensor:
    """Return ``H v`` by plain autograd twice: the convention where gradients are stopped."""
    parameters = problem.parameters()
    weights = [1.0] * len(problem.data) if total else problem.batch_weights()
    result = torch.zeros_like(v)
    for weight, batch in zip(weights, problem.data, strict=True):
        with buffers_restored(problem.model), sdpa_kernel(SDPBackend.MATH):
            loss = problem.value(batch)
            grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            reached = [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(grads, parameters, strict=True)
            ]
            slope = _flat(reached) @ v
            if slope.requires_grad:
                rows = torch.autograd.grad(slope, parameters, allow_unused=True)
                found = [
                    torch.zeros_like(p) if r is None else r
                    for r, p in zip(rows, parameters, strict=True)
                ]
                result += weight * _flat(found).detach()
    return result if total else result / sum(weights)


def count(problem: Problem) -> int:
    """Return the number of real entries of what is differentiated."""
    return _flat(problem.parameters()).numel()


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undo what a forward in training mode does to the buffers."""
    places = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in places:
            if buffer is not None and value is not None:
                buffer.detach_().copy_(value)
            module._buffers[name] = buffer


def _write(problem: Problem, point: list[Tensor], step: float, v: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for p, value in zip(problem.parameters(), point, strict=True):
            size = _flat([value]).numel()
            part = v[start : start + size].to(value.real.dtype)
            start += size
            if value.is_complex():
                p.copy_(
                    value + step * torch.view_as_complex(part.reshape(*value.shape, 2).contiguous())
                )
            else:
                p.copy_(value + step * part.view_as(value))


def _flat(tensors: list[Tensor] | list[nn.Parameter]) -> Tensor:
    parts = [t.to_dense() if t.is_sparse else t for t in tensors]
    real = [torch.view_as_real(t) if t.is_complex() else t for t in parts]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(t.reshape(-1).double() for t in real)])
