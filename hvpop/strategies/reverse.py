"""Reverse-over-reverse: ``torch.autograd.grad`` twice, the first time keeping its graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import HVPStrategy, LinearMap, Params, ScalarFunction, filled, grad_enabled, leaves
from .graphs import check_gradient, explained


class ReverseOverReverse(HVPStrategy):
    """Differentiate the gradient by backpropagation (Pearlmutter 1994, in its reverse form).

    The broadest strategy: every op with a double backward works. The gradient's graph is built once
    per map; each product is one more backward pass through it. Memory: the graph, for as long as
    the map lives. k columns go through ``is_grads_batched``, or one by one where an op refuses that.

    Examples
    --------
    >>> import torch
    >>> from hvpop.strategies import ReverseOverReverse
    >>> H = ReverseOverReverse().linearize(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])})
    >>> H({"w": torch.ones(2)})["w"]
    tensor([ 6., 12.])
    """

    def __init__(self) -> None:
        self._checked: ScalarFunction | None = None

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        with grad_enabled(), explained(self):
            point = leaves(params, differentiable=differentiable)
            loss = fn(point, *args)
            gradient: tuple[Tensor | None, ...] = (None,) * len(point)
            if loss.requires_grad:
                gradient = torch.autograd.grad(
                    loss, list(point.values()), create_graph=True, allow_unused=True
                )
            if self._checked != fn:  # once for a function is enough; a walk costs like a small net
                check_gradient(self, [g for g in gradient if g is not None])
                self._checked = fn
        return _DoubleBackward(self, point, gradient, differentiable)


class _DoubleBackward(LinearMap):
    """The kept graph of a gradient; a product is the transpose of its Jacobian, which is symmetric."""

    def __init__(
        self,
        strategy: HVPStrategy,
        point: Params,
        gradient: tuple[Tensor | None, ...],
        differentiable: bool,
    ) -> None:
        self._strategy = strategy
        self._point = point
        self._create_graph = differentiable
        # Parameters that enter linearly have a constant gradient, which has no graph to go through.
        curved = {
            n: g for n, g in zip(point, gradient, strict=True) if g is not None and g.requires_grad
        }
        self._names = list(curved)
        self._gradient = [g.to_dense() if g.is_sparse else g for g in curved.values()]
        self._batched = not differentiable

    def __call__(self, v: Params) -> Params:
        return self._pull_back([v[name] for name in self._names])

    def columns(self, V: Params) -> Params:
        k = next(iter(V.values())).shape[0]
        if k > 1 and self._batched:
            try:
                return self._pull_back([V[name] for name in self._names], k)
            except (RuntimeError, NotImplementedError):
                self._batched = False  # an op without a vmap rule: one by one from now on
        return super().columns(V)

    def _pull_back(self, cotangents: list[Tensor], k: int | None = None) -> Params:
        if not self._gradient:
            return filled(self._point, (None,) * len(self._point), k)
        with grad_enabled(), explained(self._strategy):
            products = torch.autograd.grad(
                self._gradient,
                list(self._point.values()),
                cotangents,
                retain_graph=True,
                create_graph=self._create_graph,
                allow_unused=True,
                is_grads_batched=k is not None,
            )
        return filled(self._point, products, k)
