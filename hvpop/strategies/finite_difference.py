"""Finite differences of gradients: the last resort, and the referee of the other strategies."""

from __future__ import annotations

import torch

from ..graph import backward
from .base import (
    HVPStrategy,
    LinearMap,
    Params,
    ScalarFunction,
    at,
    filled,
    grad_enabled,
    leaves,
    plain,
)
from .graphs import explained_once
from .referee import norm
from .rounding import rounding


class FiniteDifference(HVPStrategy):
    """Central difference of the gradient along ``v``: needs first derivatives only.

    The step is ``step * max(|params|, 1) / |v|``. Truncation falls with its square and rounding
    grows with its inverse, so the default ``step`` is the cube root of the dtype's epsilon and the
    relative error about ``1e-9`` in float64 and ``1e-3`` in float32, more where the function has
    kinks near the point. Cost: two gradients a product.

    Parameters
    ----------
    step : float, optional
        Relative length of the step.

    Raises
    ------
    TypeError
        For parameters in half precision, where the difference is mostly rounding.

    Examples
    --------
    >>> import torch
    >>> from hvpop.strategies import FiniteDifference
    >>> point = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    >>> H = FiniteDifference().linearize(lambda p: (p["w"] ** 3).sum(), point)
    >>> H({"w": torch.ones(2, dtype=torch.float64)})["w"].round(decimals=6)
    tensor([ 6., 12.], dtype=torch.float64)
    """

    exact = False

    def __init__(self, step: float | None = None) -> None:
        self.step = step

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        coarsest = max((p.dtype for p in params.values()), key=lambda d: torch.finfo(d).eps)
        if torch.finfo(coarsest).bits < 32:
            raise TypeError(
                f"FiniteDifference needs float32 or float64 parameters, got {coarsest}; "
                "convert the model with .float(), or use another strategy"
            )
        step = self.step or rounding(params.values()) ** (1 / 3)
        return _GradientDifference(fn, params, args, step, differentiable)


class _GradientDifference(LinearMap):
    def __init__(
        self,
        fn: ScalarFunction,
        params: Params,
        args: tuple[object, ...],
        step: float,
        differentiable: bool,
    ) -> None:
        self._fn, self._args = fn, args
        self._differentiable = differentiable
        self._point = params
        self._step = step * max(norm(params), 1.0)

    def __call__(self, v: Params) -> Params:
        length = norm(v)
        if length == 0.0:
            return {name: torch.zeros_like(p) for name, p in self._point.items()}
        h = self._step / length
        ahead, behind = self._gradient(v, h), self._gradient(v, -h)
        return {name: (ahead[name] - behind[name]) / (2 * h) for name in self._point}

    def _gradient(self, v: Params, h: float) -> Params:
        with grad_enabled(), explained_once():
            if not self._differentiable:
                moved = {n: p.detach() + h * v[n] for n, p in self._point.items()}
                return first_gradient(self._fn, moved, self._args)
            point = leaves(self._point, differentiable=True)
            moved = {name: p + h * v[name] for name, p in point.items()}
            with at(self._fn, moved, *self._args):
                loss = self._fn(moved, *self._args)
                if not loss.requires_grad:
                    return filled(moved, (None,) * len(moved))
                gradient = torch.autograd.grad(
                    loss, list(moved.values()), create_graph=True, allow_unused=True
                )
        return filled(moved, gradient)


def first_gradient(fn: ScalarFunction, point: Params, args: tuple[object, ...]) -> Params:
    """The gradient at ``point`` by ``backward()``: what hooks and Functions add past the graph counts.

    Leaves nothing in any other tensor.
    """
    leaf = {name: plain(p).detach().requires_grad_() for name, p in point.items()}
    with grad_enabled(), at(fn, leaf, *args):
        reached = backward(fn(leaf, *args), leaf)
    return filled(leaf, tuple(reached.get(name) for name in leaf))
