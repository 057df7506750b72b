"""Hessian-vector products as plain functions, for those who want no operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .curvature import HessianOperator
from .curvature.space import WeightedSum, from_point, layout_of, multiplier, to_point
from .risk import BATCHES, EmpiricalRisk
from .risk.losses import Loss
from .strategies import ForwardOverReverse, HVPStrategy, Params, ReverseOverReverse

ParamsT = TypeVar("ParamsT", Tensor, dict[str, Tensor], tuple[Tensor, ...])

VectorFunction = Callable[[Tensor], Tensor]
"""A flat vector ``(n,)`` to a flat vector ``(n,)``."""


def hvp(
    func: Callable[[ParamsT], Tensor], params: ParamsT, vec: ParamsT, reverse_only: bool = True
) -> ParamsT:
    """The Hessian of ``func`` at ``params``, times ``vec``.

    Parameters
    ----------
    func
        Takes ``params`` and returns a scalar.
    params, vec
        A tensor, or a dict or tuple of tensors, both alike.
    reverse_only
        Reverse-over-reverse; if False, forward-over-reverse, which keeps no graph.

    Returns
    -------
    The product, of the kind and shapes of ``params``.

    Examples
    --------
    >>> import torch
    >>> from hvpop.functional import hvp
    >>> z = torch.ones(3)
    >>> hvp(lambda z: (z**2).sum(), z, torch.ones(3))
    tensor([2., 2., 2.])
    """
    point, direction = _as_dict("params", params), _as_dict("vec", vec)
    shapes = {name: tuple(p.shape) for name, p in point.items()}
    given = {name: tuple(v.shape) for name, v in direction.items()}
    if (type(params) is not type(vec) and not isinstance(params, Tensor)) or shapes != given:
        raise ValueError(f"hvp: vec must be like params, expected shapes {shapes}, got {given}")

    def scalar(p: Params) -> Tensor:
        return func(_like(params, p))

    product = _strategy(reverse_only).linearize(scalar, point)(direction)
    return _like(params, product)


def batch_loss_function(model: nn.Module, loss: Loss, x: Any, y: Any) -> Callable[[Params], Tensor]:
    """The loss on one batch as a function of a dict of parameters by name.

    Inputs and targets go to the model's device; the model's own parameters stay as they are.

    Examples
    --------
    >>> import torch
    >>> from hvpop.functional import batch_loss_function
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> f = batch_loss_function(model, torch.nn.MSELoss(), torch.ones(1, 1), torch.ones(1, 1))
    >>> f({"weight": torch.tensor([[3.0]])})
    tensor(4.)
    """
    return empirical_loss_function(model, loss, [(x, y)])


def empirical_loss_function(
    model: nn.Module, loss: Loss, data_loader: Any
) -> Callable[[Params], Tensor]:
    """The sample-weighted mean of the batch losses as a function of a dict of parameters.

    Reads the data at each call. Parameters that the dict does not name keep their values.
    """
    risk = EmpiricalRisk(model, loss, data_loader, mode="full")

    def empirical_loss(params: Params) -> Tensor:
        risk.parameters()
        held = risk.names()
        unknown = [name for name in params if name not in held]
        if unknown:
            raise ValueError(
                f"no parameter is called {', '.join(unknown)}; there are {', '.join(held)}"
            )
        (term,) = risk.terms()
        value: Tensor = term.function(params, risk.state(), *term.data)
        return value

    return empirical_loss


def batch_hvp_gen(
    model: nn.Module, loss: Loss, data_loader: Any, reverse_only: bool = True
) -> Iterator[VectorFunction]:
    """One function ``v -> H_i v`` for each batch ``i``, on flat vectors; each keeps its own batch."""
    for batch in data_loader:
        yield get_hvp_function(model, loss, [batch], reverse_only=reverse_only)


def get_hvp_function(
    model: nn.Module,
    loss: Loss,
    data_loader: Any,
    use_hessian_avg: bool = True,
    reverse_only: bool = True,
    track_gradients: bool = False,
) -> VectorFunction:
    """The function ``v -> H v`` on flat vectors ``(n,)``, at the parameters of each call.

    Parameters
    ----------
    model, loss, data_loader
        ``loss(model(x), y)`` for batches ``(x, y)``; parameters with ``requires_grad`` count.
    use_hessian_avg
        Average the Hessians of the batches with equal weight. If False, differentiate the
        empirical loss of all the data as one function, which holds all its graphs at once.
    reverse_only
        Reverse-over-reverse; if False, forward-over-reverse.
    track_gradients
        Return products that autograd can differentiate with respect to the parameters.

    Examples
    --------
    >>> import torch
    >>> from hvpop.functional import get_hvp_function
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> product = get_hvp_function(model, torch.nn.MSELoss(), [(torch.eye(2), torch.zeros(2, 1))])
    >>> product(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if use_hessian_avg:
        risk = EmpiricalRisk(model, loss, data_loader, average=BATCHES)
    else:
        risk = EmpiricalRisk(model, loss, data_loader, mode="full")
    H = HessianOperator.from_risk(risk, strategy=_strategy(reverse_only))
    if not track_gradients:
        return lambda v: H @ v.to(H.device)
    return lambda v: _differentiable_product(H, v.to(H.device))


def _differentiable_product(H: HessianOperator, v: Tensor) -> Tensor:
    """``H v`` with its graph down to the live parameters."""
    if v.shape != (H.shape[1],):
        raise ValueError(f"{H!r} expects shape ({H.shape[1]},), got {tuple(v.shape)}")
    point, state = H.risk.parameters(), H.risk.state()
    V = v.detach().unsqueeze(1)
    multiply = multiplier(to_point(V, layout_of(point), point))
    total = WeightedSum(normalized=True)
    with torch.enable_grad(), closing(H.risk.terms()) as terms:
        for term in terms:
            linear = H.strategy.linearize(
                term.function, point, state, *term.data, differentiable=True
            )
            total.add(multiply(linear), term.weight)
        return from_point(total.result(), V)[:, 0]


def _strategy(reverse_only: bool) -> HVPStrategy:
    return ReverseOverReverse() if reverse_only else ForwardOverReverse()


def _as_dict(who: str, tensors: Any) -> Params:
    if isinstance(tensors, Tensor):
        return {"": tensors}
    if isinstance(tensors, tuple | list):
        return {str(i): t for i, t in enumerate(tensors)}
    if isinstance(tensors, dict):
        return tensors
    raise TypeError(
        f"hvp: {who} must be a tensor, or a dict or tuple of them, got {type(tensors).__name__}"
    )


def _like(params: ParamsT, tensors: Params) -> ParamsT:
    if isinstance(params, Tensor):
        return tensors[""]
    if isinstance(params, dict):
        return type(params)(tensors)
    fields = tuple(tensors.values())
    return type(params)(*fields) if hasattr(params, "_fields") else type(params)(fields)
