"""A function parted where its loss meets the outputs: their Jacobian, and the loss as a function of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..exchange import dual_level
from ..graph import edge, leaves_of, pulled
from ..interception import Interception, Table
from ..marker import AT_MARKS, Cut, Cutting
from .base import Params, ScalarFunction, at, filled, grad_enabled, leaves, plain
from .forward import ForwardMode, load_forward_rules
from .referee import norm
from .rounding import rounding
from .tangents import TANGENTS, DifferentiatedInsideError

Tensors = list[Tensor]


class Parted:
    """A function at a point: ``outputs`` of the parameters, and ``loss`` of ``leaves`` in their place.

    ``cutting`` says where; what is in ``handing`` is handed to the loss in place of outputs of its shape.

    Raises
    ------
    ValueError
        If the function marks no outputs, or one that depends on another.
    """

    def __init__(
        self,
        fn: ScalarFunction,
        params: Params,
        args: tuple[object, ...],
        tangents: Params | None = None,
        cutting: Cutting = AT_MARKS,
        handing: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.fn, self.args = fn, args
        self.point = leaves(params, differentiable=False)
        place = self.point
        if tangents is not None:
            place = {
                n: forward_ad.make_dual(p, plain(tangents[n]).to(p.dtype))
                for n, p in self.point.items()
            }
        cut = Cut(cutting, handing)
        with at(fn, place, *args), cut:
            self.loss = fn(place, *args)
        self.handed = cut.leaves  # all of them
        self.outputs, self.leaves, self.calls = cut.outputs, cut.leaves, cut.calls
        self.cutting = cutting
        if cutting.at_calls:
            self._forget_what_is_for_the_record()
        if not self.outputs:
            unfed = UNFED if cutting.at_inputs else UNMARKED
            raise ValueError(UNCALLED if cutting.at_calls else unfed)
        self.tangents: list[Tensor | None] = []
        if tangents is not None:
            duals = [forward_ad.unpack_dual(z) for z in self.outputs]
            self.outputs = [dual.primal for dual in duals]
            self.tangents = [dual.tangent for dual in duals]
            if forward_ad.unpack_dual(self.loss).tangent is not None:
                self.loss = forward_ad.unpack_dual(self.loss).primal
        if len(self.outputs) > 1:
            self._refuse_chains()

    def _forget_what_is_for_the_record(self) -> None:
        """Leave out what was handed to loss functions whose value is no part of the loss."""
        ends = {id(leaf) for leaf in leaves_of(self.loss)}
        kept = [i for i, leaf in enumerate(self.leaves) if id(leaf) in ends]
        if kept:
            self.outputs = [self.outputs[i] for i in kept]
            self.leaves = [self.leaves[i] for i in kept]

    def around(self) -> AbstractContextManager[None]:
        """What has to be in force while derivatives are taken."""
        return at(self.fn, self.point, *self.args)

    def beside(self) -> list[str]:
        """The parameters that the loss reaches past its outputs."""
        ends = {id(leaf) for leaf in leaves_of(self.loss)}
        return [name for name, p in self.point.items() if id(p) in ends]

    def refuse_beside(self) -> None:
        """Raise if the loss reaches parameters past its outputs."""
        beside = self.beside() if self.loss.requires_grad else []
        if beside:
            raise ValueError(
                f"the loss reaches {', '.join(beside[:3])} past the outputs of the model, as a penalty "
                "on parameters does, which J' B J does not have in it; leave it out of the loss, and add "
                "its Hessian as an operator: G + HessianOperator(...), or c * Identity.like(G); parameters "
                "of the loss's own (a temperature) are left out by params="
            )

    def pull(self, s: Tensors, k: int | None = None, *, keep: bool = True) -> Params:
        """``J' s``."""
        pairs = [(z, t) for z, t in zip(self.outputs, s, strict=True) if z.requires_grad]
        if not pairs:
            return filled(self.point, (None,) * len(self.point), k)
        found = pulled(
            [z for z, _ in pairs],
            list(self.point.values()),
            [t for _, t in pairs],
            batched=k is not None,
            keep=keep,
        )
        return filled(self.point, found, k)

    def _refuse_chains(self) -> None:
        own = {id(leaf) for leaf in self.leaves}
        for z in self.outputs:
            if any(id(leaf) in own for leaf in leaves_of(z)):
                raise ValueError(
                    "outputs are marked of which one is computed from another; mark what the loss is "
                    "handed last, once"
                )


UNMARKED = (
    "the loss does not say which the outputs of its model are, so that it cannot be parted there; mark "
    "them where they meet the loss: loss(hvpop.outputs(model(x)), y)"
)


UNFED = (
    "the loss does not say which the inputs of its model are, or they are no floating point numbers; mark "
    "them where they enter: loss(model(hvpop.inputs(x)), y)"
)

UNCALLED = (
    "the loss calls none of the loss functions of torch.nn.functional on outputs of the model, so that "
    "neither its terms nor the distribution that it is the likelihood of can be told; "
    "GaussNewtonOperator takes any loss of marked outputs"
)


class DoublePullBack:
    """``J v`` as the transpose of ``u -> J' u``, whose graph is kept (Townsend 2017)."""

    def __init__(self, parted: Parted) -> None:
        self._like = parted.outputs
        self._curved = [z for z in parted.outputs if z.requires_grad]
        # Linear in u, so that any will do; but some derivatives of torch's are no numbers at zero.
        self._u = [torch.ones_like(z).requires_grad_() for z in self._curved]
        back: tuple[Tensor | None, ...] = ()
        if self._curved:
            back = pulled(self._curved, list(parted.point.values()), self._u, create_graph=True)
        reached = {
            n: g
            for n, g in zip(parted.point, back, strict=bool(back))
            if g is not None and g.requires_grad
        }
        self._names = list(reached)
        dense = [g.to_dense() if g.is_sparse else g for g in reached.values()]
        self.graph = [edge(g) for g in dense]  # without the numbers, as large as parameters

    def __call__(self, v: Params, k: int | None = None) -> Tensors:
        found: tuple[Tensor | None, ...] = (None,) * len(self._u)
        if self.graph:
            cotangents = [v[name] for name in self._names]
            found = pulled(self.graph, self._u, cotangents, batched=k is not None)
        given = iter(found)
        lead = () if k is None else (k,)
        tangents = [next(given) if z.requires_grad else None for z in self._like]
        return [
            z.new_zeros(lead + z.shape) if t is None else t
            for z, t in zip(self._like, tangents, strict=True)
        ]


def pushed_forward(
    fn: ScalarFunction, params: Params, args: tuple[object, ...], v: Params, cutting: Cutting
) -> tuple[Parted, Tensors]:
    """A parted function, and ``J v`` by dual numbers: both from one evaluation."""
    load_forward_rules()
    try:
        return _pushed_forward(fn, params, args, v, cutting, TANGENTS)
    except DifferentiatedInsideError:  # torch's own rules keep tangents in the graph
        return _pushed_forward(fn, params, args, v, cutting, {})


def _pushed_forward(
    fn: ScalarFunction,
    params: Params,
    args: tuple[object, ...],
    v: Params,
    cutting: Cutting,
    rules: Table,
) -> tuple[Parted, Tensors]:
    with grad_enabled(), dual_level(), ForwardMode(), Interception(rules):
        parted = Parted(fn, params, args, v, cutting)
        tangents = [
            torch.zeros_like(z) if t is None else t.detach()
            for z, t in zip(parted.outputs, parted.tangents, strict=True)
        ]
    return parted, tangents


class Differences:
    """``J v`` by central differences of the outputs."""

    def __init__(self, parted: Parted, step: float | None = None) -> None:
        self._parted = parted
        step = rounding(parted.point.values()) ** (1 / 3) if step is None else step
        self._step = step * max(norm(parted.point), 1.0)

    def __call__(self, v: Params, k: int | None = None) -> Tensors:
        length = norm(v)
        if length == 0.0:
            return [torch.zeros_like(z) for z in self._parted.outputs]
        h = self._step / length
        pairs = zip(self._at(v, h), self._at(v, -h), strict=True)
        return [(ahead - behind) / (2 * h) for ahead, behind in pairs]

    def _at(self, v: Params, h: float) -> Tensors:
        fn, args = self._parted.fn, self._parted.args
        place = {n: p.detach() + h * v[n] for n, p in self._parted.point.items()}
        moved = leaves(place, differentiable=False)  # hooks in a model want what they are put on to
        cut = Cut(self._parted.cutting)
        with at(fn, moved, *args), cut:
            fn(moved, *args)
        return [z.detach() for z in cut.outputs]
