"""Activations, weight norm, products and inverses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _in_place(formula: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The formula of an op whose name ends in an underscore."""

    def written(input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        result = formula(input.clone(), *args, **kwargs)
        return result if result is None else input.copy_(result)

    return written


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def sinc(input: Tensor, *, out: Tensor | None = None) -> Tensor | None:
    if out is not None or not input.is_floating_point():
        return None
    x = math.pi * input
    small = x.detach().abs() < 0.5
    square = torch.where(small, x * x, 0)
    series = torch.ones_like(square)  # of sin(x) / x, whose next term is 0.5**16 / 17!
    for n in range(14, 0, -2):
        series = 1 - square / (n * (n + 1)) * series
    x = torch.where(small, 1, x)
    return torch.where(small, series, x.sin() / x)


sinc_ = _in_place(sinc)


def logaddexp(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor | None:
    if out is not None or not (input.is_floating_point() and other.is_floating_point()):
        return None
    finite = input.isfinite() & other.isfinite()
    a, b = (torch.where(finite, x, 0) for x in (input, other))
    # the larger one, and what the other adds; both ways have the same derivatives where they meet
    total = torch.where(a > b, a + F.softplus(b - a), b + F.softplus(a - b))
    return torch.where(finite, total, torch.maximum(input, other))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    norm: Tensor
    others = [i for i in range(v.dim()) if i != dim % v.dim()]
    if dim == -1:  # torch's code for one norm of the whole tensor
        norm = torch.linalg.vector_norm(v)
    else:
        norm = torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()
    return v * (g / norm)


def scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor | None:
    if reduce != "prod" or input.dim() == 0 or index.numel() == 0:
        return None
    # Entries that go to one place are numbered; entry number r goes to layer r; layers multiply.
    dim = dim % input.dim()
    src = src[tuple(slice(size) for size in index.shape)]
    ordered, order = index.sort(dim=dim, stable=True)
    place = _along(torch.arange(index.shape[dim], device=index.device), dim, index)
    first = (ordered != ordered.roll(1, dim)) | (place == 0)
    number = place - torch.where(first, place, 0).cummax(dim).values
    number = torch.zeros_like(index).scatter(dim, order, number)
    size, layers = input.shape[dim], int(number.max()) + 1
    ones = torch.ones_like(input).repeat_interleave(layers, dim)
    shape = (*input.shape[:dim], layers, *input.shape[dim:])
    product = ones.scatter(dim, number * size + index, src).reshape(shape).prod(dim)
    if include_self:
        return input * product
    reached = torch.zeros_like(input, dtype=torch.bool).scatter(dim, index, True)
    return torch.where(reached, product, input)


scatter_reduce_ = _in_place(scatter_reduce)


def index_reduce(
    input: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
    out: Tensor | None = None,
) -> Tensor | None:
    if out is not None or input.dim() == 0 or index.dim() != 1:
        return None
    if index.shape[0] != source.shape[dim] or source.dim() != input.dim():
        return None
    one = source.new_zeros(1)
    torch.index_reduce(one, 0, index.new_zeros(1), one, reduce)  # warns, once
    arguments = input, dim, _along(index, dim % input.dim(), source), source, reduce
    result = scatter_reduce(*arguments, include_self=include_self)
    if result is None:
        result = torch.scatter_reduce(*arguments, include_self=include_self)
    return result


index_reduce_ = _in_place(index_reduce)


def renorm(
    input: Tensor, p: float, dim: int, maxnorm: float, *, out: Tensor | None = None
) -> Tensor | None:
    if out is not None or input.dim() < 2 or p <= 0 or maxnorm < 0:
        return None
    others = [i for i in range(input.dim()) if i != dim % input.dim()]
    long = torch.linalg.vector_norm(input.detach(), p, others, keepdim=True) > maxnorm
    norm = torch.linalg.vector_norm(torch.where(long, input, 1), p, others, keepdim=True)
    return input * torch.where(long, maxnorm / (norm + 1e-7), 1)


renorm_ = _in_place(renorm)


def cholesky_inverse(input: Tensor, upper: bool = False) -> Tensor:
    identity = torch.eye(input.shape[-1], dtype=input.dtype, device=input.device)
    return torch.cholesky_solve(identity.expand_as(input), input, upper=upper)


def triangular_solve(
    b: Tensor,
    A: Tensor,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
    **out: Any,
) -> Any:
    result = torch.triangular_solve(b, A, upper, transpose, unitriangular, **out)  # warns
    if out:
        return result
    factor, upper = (A.mT, not upper) if transpose else (A, upper)
    options: dict[str, bool] = {"upper": upper, "unitriangular": unitriangular}
    return type(result)((torch.linalg.solve_triangular(factor, b, **options), A.clone()))


def native_layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...] | None:
    if weight is not None or bias is None:
        return None
    normed, mean, scale = torch.native_layer_norm(input, normalized_shape, None, None, eps)
    return normed + bias, mean, scale


def _along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    """Lay a vector along one axis of a shape."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return vector.reshape(shape).expand_as(like)
