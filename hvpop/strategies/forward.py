"""Forward-over-reverse: the directional derivative of the gradient, by dual numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _torch
from ..exchange import dual_level, without_onednn
from ..interception import Interception, Table
from .authored import hold_against_differences, refuse_hidden, ungraded
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
from .graphs import NoSecondDerivativeError, explained
from .referee import norm
from .reverse import ReverseOverReverse
from .rounding import agree, nudged, rounding


class ForwardOverReverse(HVPStrategy):
    """Backpropagate dual numbers (Pearlmutter 1994): the tangent of the gradient is the product.

    Keeps nothing between products, so memory is that of one gradient with its graph; each product
    evaluates the function anew. Needs forward-mode rules for every op of the function and of its
    gradient. Some of torch's rules are wrong, so the first product with a function is compared with
    that of reverse-over-reverse, and a warning tells if they differ.

    Examples
    --------
    >>> import torch
    >>> from hvpop.strategies import ForwardOverReverse
    >>> H = ForwardOverReverse().linearize(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])})
    >>> H({"w": torch.ones(2)})["w"]
    tensor([ 6., 12.])
    """

    compared: ScalarFunction | None = None
    """The function at work, once a product with it has been compared."""

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        load_forward_rules()
        linear = _TangentOfGradient(self, fn, params, args, differentiable)
        if self.compared == fn or differentiable:
            return linear
        return _ComparedOnce(self, linear, fn, params, args)


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
        with grad_enabled(), dual_level():
            point = leaves(self._params, differentiable=self._differentiable)
            with explained(self._strategy), ungraded(self._fn, point):
                dual = {
                    n: forward_ad.make_dual(p, plain(v[n]).to(p.dtype)) for n, p in point.items()
                }
                with ForwardMode(), at(self._fn, dual, *self._args):
                    loss = self._fn(dual, *self._args)
                    if not loss.requires_grad:
                        return filled(point, (None,) * len(point))
                    # create_graph even though no third derivative is wanted: without it some backward
                    # formulas take shortcuts that drop tangents (linalg.solve) or raise (silu).
                    gradient = torch.autograd.grad(
                        loss, list(dual.values()), create_graph=True, allow_unused=True
                    )
                    refuse_hidden(self._strategy, self._fn, point, loss)
                tangents = tuple(
                    None if g is None else forward_ad.unpack_dual(g).tangent for g in gradient
                )
            products = filled(point, tangents)
        return products if self._differentiable else {n: t.detach() for n, t in products.items()}


class _ComparedOnce(LinearMap):
    """A map whose first product is made by reverse-over-reverse as well."""

    def __init__(
        self,
        strategy: ForwardOverReverse,
        linear: LinearMap,
        fn: ScalarFunction,
        params: Params,
        args: tuple[object, ...],
    ) -> None:
        self._strategy, self._linear = strategy, linear
        self._fn, self._params, self._args = fn, params, args

    def __call__(self, v: Params) -> Params:
        product = self._linear(v)
        if self._strategy.compared != self._fn:
            self._strategy.compared = self._fn
            try:
                reference = ReverseOverReverse().linearize(self._fn, self._params, *self._args)(v)
            except NoSecondDerivativeError:
                hold_against_differences(
                    self._strategy, self._fn, self._params, self._args, self._linear
                )
            except Exception:  # no memory for a graph
                return product
            else:
                place = nudged(self._params)
                _compare(
                    product,
                    reference,
                    v,
                    lambda: ReverseOverReverse().linearize(self._fn, place, *self._args)(v),
                )
        return product


def _compare(product: Params, reference: Params, v: Params, again: Callable[[], Params]) -> None:
    eps = rounding(product.values())
    if agree(product.values(), reference.values(), eps**0.4, lambda: again().values()):
        return
    error = norm({n: p - reference[n] for n, p in product.items()})
    scale = max(norm(product), norm(reference))
    if math.isfinite(error) and scale > 0:
        warnings.warn(
            f"ForwardOverReverse and ReverseOverReverse differ by {error / scale:.0e} on the first "
            "product: a forward-mode rule of torch, or of a custom autograd.Function, contradicts "
            "the reverse-mode one; H.check() tells more",
            stacklevel=2,
        )


class ForwardMode(Interception):
    """What torch's forward mode does not do by itself.

    Under ``torch.no_grad()`` tangents stop as gradients do; torch lets them through. Recurrent
    layers run without oneDNN, whose kernels for them have no forward derivative; torch's own have.
    """

    def __init__(self) -> None:
        super().__init__(_FORWARD)

    def _change(self) -> None:
        self._noted(_torch.set_fwd_grad_enabled, True)
        super()._change()


def _without_onednn(op: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with without_onednn():
            return op(*args, **kwargs)

    return called


_FORWARD: Table = {
    _torch.set_grad_enabled: _torch.set_fwd_grad_enabled,  # which returns None
    **{op: _without_onednn(op) for op in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}


@cache
def load_forward_rules() -> None:
    """Let torch load its forward-mode rules, which warns of a deprecation inside torch itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
