"""What a strategy is: something that turns (scalar function, point) into the linear map v -> H v."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import _torch
from ..exchange import Exchange
from ..graph import End

Params = dict[str, Tensor]
"""A point, a direction or a product: parameter name -> tensor."""

ScalarFunction = Callable[..., Tensor]
"""``fn(params, *args)`` -> 0-dim tensor; only ``params`` is differentiated."""


class LinearMap(ABC):
    """The Hessian of one scalar function at one point, known by its products.

    A map holds whatever does not depend on ``v``, for as long as it lives.
    """

    looks: bool = True
    """Whether a product may look at more than the map itself: at a model, say, in a hook."""

    bare: bool = False
    """Whether products are no more than what a trace would leave of them."""

    beside: int = 0
    """Bytes that the map keeps and no graph shows."""

    ends: Sequence[End] | None = None
    """Where the autograd graphs begin that the map holds; None: not known, or they keep more than they show."""

    @abstractmethod
    def __call__(self, v: Params) -> Params:
        """``H v``: tensors shaped like the parameters, in and out."""

    def verify(self) -> None:  # noqa: B027 (most maps were made just now: nothing to see)
        """See that the map is still that of its function, if it was not made from it just now."""

    def columns(self, V: Params) -> Params:
        """``H V`` for k columns: tensors of shape ``(k, *parameter.shape)``, in and out."""
        columns = zip(*(block.unbind() for block in V.values()), strict=True)
        products = [self(dict(zip(V, column, strict=True))) for column in columns]
        return {name: torch.stack([p[name] for p in products]) for name in products[0]}


class HVPStrategy(ABC):
    """How to differentiate twice.

    A strategy is stateless towards its users: `linearize` may be called for any number of
    functions, points and batches. Subclass it, return a `LinearMap`, and pass an instance as
    ``strategy=`` to any operator of `hvpop.curvature`.
    """

    @abstractmethod
    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        """The map ``v -> H v`` of ``fn(params, *args)`` at ``params``.

        Parameters
        ----------
        fn
            Returns a 0-dim tensor. Called under grad mode, any number of times.
        params
            The point; never written to. Not copied either: it must stay as it is while the map lives.
        *args
            Data (tensors, nested containers), not differentiated.
        differentiable
            Return products that autograd can differentiate again with respect to ``params``.
        """

    def once(self, fn: ScalarFunction, params: Params, *args: object) -> LinearMap:
        """The same map where one vector is to be multiplied, and keeping anything would not pay."""
        return self.linearize(fn, params, *args)

    def of(self, strategy: HVPStrategy) -> HVPStrategy:
        """What makes the same matrix, with derivatives taken by another strategy."""
        return strategy

    of_gradients: bool = True
    """Whether products are derivatives of the gradient, so that its differences tell what is right."""

    exact: bool = True
    """Whether products are right to rounding."""

    @property
    def plain(self) -> HVPStrategy:
        """The strategy that this one wraps, if it is costly to set up; otherwise itself."""
        return self

    def within(self, wrap: Callable[[HVPStrategy], HVPStrategy]) -> HVPStrategy:
        """``wrap(self)``; of a strategy that is made of others, itself made of those wrapped."""
        return wrap(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class grad_enabled(AbstractContextManager[None]):  # noqa: N801 (used like a function)
    """Grad mode on and autocast off, whatever the caller is in (``inference_mode`` included)."""

    def __enter__(self) -> None:
        self._exchange: _GradEnabled | None = None
        autocast = [d for d in _AUTOCAST if torch.is_autocast_enabled(d)]
        if autocast or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self._exchange = _GradEnabled(autocast)
            self._exchange.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._exchange is not None:
            self._exchange.__exit__()


class _GradEnabled(Exchange):
    def __init__(self, autocast: list[str]) -> None:
        super().__init__()
        self._autocast = autocast

    def _change(self) -> None:
        for device in self._autocast:  # would make the products bf16-accurate
            self._noted(torch.set_autocast_enabled, device, True)
            torch.set_autocast_enabled(device, False)
        if torch.is_inference_mode_enabled():
            mode = torch.inference_mode(False)
            self._noted(mode.__exit__, None, None, None)
            mode.__enter__()
        self._noted(_torch.set_grad_enabled, torch.is_grad_enabled())
        _torch.set_grad_enabled(True)


_AUTOCAST = ("cpu", "cuda")


def at(fn: ScalarFunction, params: Params, *args: object) -> AbstractContextManager[None]:
    """What has to be in force while derivatives of a function are taken, backward passes included.

    A function whose backward pass may look at more than its arguments has a method ``at``.
    """
    enter = getattr(fn, "at", None)
    return nullcontext() if enter is None else enter(params, *args)


def leaves(params: Params, *, differentiable: bool) -> Params:
    """The tensors to differentiate by: ``params`` themselves where possible, else aliases of them.

    An alias keeps the hooks of a parameter out of the derivative, and what it was computed from.
    """
    if differentiable:
        return {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
    return {
        n: p
        if p.is_leaf and p.requires_grad and not p._backward_hooks and not p.is_inference()
        else plain(p).detach().requires_grad_()
        for n, p in params.items()
    }


def plain(tensor: Tensor) -> Tensor:
    """The tensor, copied if it was made under ``inference_mode`` (autograd refuses to save those)."""
    return tensor.clone() if tensor.is_inference() else tensor


def aligned(v: Tensor) -> Tensor:
    """The vector as `torch.view_as_complex` takes it: in order, from an even place in its storage."""
    if v.storage_offset() % 2 == 0:
        return v.contiguous()
    return v.clone(memory_format=torch.contiguous_format)


def filled(names: Params, results: tuple[Tensor | None, ...], k: int | None = None) -> Params:
    """Results by name; a parameter that the function does not reach gets zeros."""
    filled_in: Params = {}
    for (name, like), result in zip(names.items(), results, strict=True):
        if result is None:
            result = like.new_zeros(like.shape if k is None else (k, *like.shape))
        filled_in[name] = result.to_dense() if result.is_sparse else result
    return filled_in


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )
