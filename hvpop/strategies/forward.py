"""Forward-over-reverse: the directional derivative of the gradient, by dual numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.autograd import forward_ad

from .base import (
    HVPStrategy,
    LinearMap,
    Params,
    ScalarFunction,
    filled,
    grad_enabled,
    leaves,
    plain,
)
from .graphs import explained


class ForwardOverReverse(HVPStrategy):
    """Backpropagate dual numbers (Pearlmutter 1994): the tangent of the gradient is the product.

    Keeps nothing between products, so memory is that of one gradient with its graph; each product
    evaluates the function anew. Needs forward-mode rules for every op of the function and of its
    gradient.

    Examples
    --------
    >>> import torch
    >>> from hvpop.strategies import ForwardOverReverse
    >>> H = ForwardOverReverse().linearize(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])})
    >>> H({"w": torch.ones(2)})["w"]
    tensor([ 6., 12.])
    """

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        _load_forward_rules()
        return _TangentOfGradient(self, fn, params, args, differentiable)


class _TangentOfGradient(LinearMap):
    def __init__(
        self,
        strategy: HVPStrategy,
        fn: ScalarFunction,
        params: Params,
        args: tuple[object, ...],
        differentiable: bool,
    ) -> None:
        self._strategy = strategy
        self._fn, self._params, self._args = fn, params, args
        self._differentiable = differentiable

    def __call__(self, v: Params) -> Params:
        with grad_enabled(), _native_kernels(), forward_ad.dual_level():
            point = leaves(self._params, differentiable=self._differentiable)
            with explained(self._strategy):
                dual = {
                    n: forward_ad.make_dual(p, plain(v[n]).to(p.dtype)) for n, p in point.items()
                }
                loss = self._fn(dual, *self._args)
                if not loss.requires_grad:
                    return filled(point, (None,) * len(point))
                # create_graph even though no third derivative is wanted: without it some backward
                # formulas take shortcuts that drop tangents (linalg.solve) or raise (silu).
                gradient = torch.autograd.grad(
                    loss, list(dual.values()), create_graph=True, allow_unused=True
                )
                tangents = tuple(
                    None if g is None else forward_ad.unpack_dual(g).tangent for g in gradient
                )
            products = filled(point, tangents)
        return products if self._differentiable else {n: t.detach() for n, t in products.items()}


@contextmanager
def _native_kernels() -> Iterator[None]:
    """Without oneDNN, whose recurrent kernels have no forward derivative; torch's own have."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@cache
def _load_forward_rules() -> None:
    """Let torch load its forward-mode rules, which warns of a deprecation inside torch itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
