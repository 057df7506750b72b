"""Sums: values of a graph that are not computed yet, as weighted sums of values that are."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
Scalar = int | float


@dataclass(frozen=True, slots=True)
class Term:
    """``scale * factor * atom``, broadcast. The atom depends on v, the factor (if any) does not."""

    scale: Scalar
    factor: fx.Node | None
    atom: fx.Node


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of its terms, broadcast to ``shape``."""

    shape: tuple[int, ...]
    terms: tuple[Term, ...]

    @property
    def plain(self) -> fx.Node | None:
        """The node that is this sum as it stands, if there is one."""
        (term, *others) = self.terms
        alone = not others and term.factor is None and term.scale == 1
        return term.atom if alone and shape_of(term.atom) == self.shape else None

    @property
    def single(self) -> Term | None:
        """The only term, if there is one and nothing in it is broadcast."""
        (term, *others) = self.terms
        parts = [term.atom] if term.factor is None else [term.atom, term.factor]
        whole = not others and all(shape_of(part) == self.shape for part in parts)
        return term if whole else None


Value = fx.Node | Sum


class Writer:
    """Writes a graph in which each expression occurs once, with algebra on sums."""

    def __init__(self, graph: fx.Graph, mode: Any) -> None:
        self.graph = graph
        self.varying: set[fx.Node] = set()  # the nodes that depend on v
        self._mode = mode  # in which shapes are worked out
        self._known: dict[Hashable, fx.Node] = {}

    def varies(self, values: Any) -> bool:
        return any(isinstance(x, Sum) or x in self.varying for x in _leaves(values))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The node ``target(*args)``: the one there is, or a new one."""
        key = _key(target, args, kwargs)
        if key not in self._known:
            fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda a: a.meta["val"])
            with self._mode, torch.no_grad():
                val = target(*fake_args, **fake_kwargs)
            self._known[key] = self._node(val, target, args, kwargs)
        return self._known[key]

    def copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The old node's operation, whose result is known, of the new arguments."""
        key = _key(node.target, args, kwargs)
        if key not in self._known:
            self._known[key] = self._node(node.meta.get("val"), node.target, args, kwargs)
        return self._known[key]

    def _node(self, val: Any, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = val
        if self.varies((args, kwargs)):
            self.varying.add(node)
        return node

    # -- algebra -------------------------------------------------------------------------------

    def sum_of(self, value: Value) -> Sum:
        return value if isinstance(value, Sum) else Sum(shape_of(value), (Term(1, None, value),))

    def scaled(self, value: Value, scale: Scalar) -> Sum:
        total = self.sum_of(value)
        return replace(total, terms=tuple(replace(t, scale=t.scale * scale) for t in total.terms))

    def times(self, value: Value, factor: fx.Node) -> Sum:
        """The value times something that does not depend on v."""
        total = self.sum_of(value)
        shape = broadcast(total.shape, shape_of(factor))
        if math.prod(shape) > math.prod(total.shape) and any(t.factor for t in total.terms):
            total = self.sum_of(self.written(total))  # small now, and its weights stay small
        scale, factor = self._split_number(factor)
        if is_ones(factor):
            return replace(self.scaled(total, scale), shape=shape)
        return Sum(shape, tuple(self._weighted(term, scale, factor) for term in total.terms))

    def _weighted(self, term: Term, scale: Scalar, factor: fx.Node) -> Term:
        if term.factor is not None and not _is_masked(factor, term.factor):
            factor = self.call(aten.mul.Tensor, term.factor, factor)
        return Term(term.scale * scale, factor, term.atom)

    def _split_number(self, factor: fx.Node) -> tuple[Scalar, fx.Node]:
        """``(2 P) (q / 3)`` as ``2/3`` and ``P q``, so that equal factors are seen to be equal."""
        large, small = divided(factor)
        if isinstance(small, Scalar):
            scale, factor = self._split_number(large)
            return scale * small, factor
        if factor.target is not aten.mul.Tensor or not all(
            isinstance(part, fx.Node) for part in factor.args
        ):
            return 1, factor
        (s, a), (t, b) = map(self._split_number, args_of(factor))
        for one, other in ((a, b), (b, a)):
            if is_ones(one) and shape_of(other) == shape_of(factor):
                return s * t, other
        return s * t, factor if s == t == 1 else self.call(aten.mul.Tensor, a, b)

    def plus(self, shape: tuple[int, ...], terms: Iterable[Term]) -> Sum:
        """The sum of the terms, those of the same atom merged."""
        groups: dict[fx.Node, list[Term]] = {}
        for term in terms:
            groups.setdefault(term.atom, []).append(term)
        return Sum(shape, tuple(self._one_term(group) for group in groups.values()))

    def _one_term(self, group: list[Term]) -> Term:
        """``s P a + t Q a`` as ``s (P + t/s Q) a``."""
        group = [term for term in group if term.scale] or group[:1]
        first, *others = sorted(group, key=lambda term: term.factor is None)
        for term in others:
            if first.factor is None:
                first = replace(first, scale=first.scale + term.scale)
            else:
                ratio = term.scale / first.scale
                added = ratio if term.factor is None else self._times(term.factor, ratio)
                first = replace(first, factor=self.call(aten.add.Tensor, first.factor, added))
        return first

    def _times(self, node: fx.Node, scale: Scalar) -> fx.Node:
        return node if scale == 1 else self.call(aten.mul.Tensor, node, scale)

    # -- writing a sum out ---------------------------------------------------------------------

    def written(self, value: Value) -> fx.Node:
        """The node that computes the value."""
        if isinstance(value, fx.Node):
            return value
        terms = [self._peeled(term) for term in value.terms]
        terms = self._merged_by_size(self._merged_by_factor(terms))
        first, *others = sorted(terms, key=_cost_of_starting_with)
        result = self._product(first)
        for term in others:
            if term.factor is None:
                alpha = {} if term.scale == 1 else {"alpha": term.scale}
                result = self.call(aten.add.Tensor, result, term.atom, **alpha)
            else:
                scale = {} if term.scale == 1 else {"value": term.scale}
                result = self.call(aten.addcmul.default, result, term.atom, term.factor, **scale)
        if shape_of(result) != value.shape:
            result = self.call(aten.expand.default, result, list(value.shape))
        return result

    def _product(self, term: Term) -> fx.Node:
        atom, factor = term.atom, term.factor
        if factor is None:
            return self._times(atom, term.scale)
        if size_of(atom) < size_of(factor):
            return self.call(aten.mul.Tensor, self._times(atom, term.scale), factor)
        return self.call(aten.mul.Tensor, atom, self._times(factor, term.scale))

    def _peeled(self, term: Term) -> Term:
        """Numbers go out of the factor, and small parts of a large factor into a small atom.

        ``s (P q)`` becomes ``(s q) P``: a small operation in place of another large residual, and
        more terms that share their factor. (Sums are left alone: ``s (x - mean)`` must not become
        ``s x - s mean``, which cancels.)
        """
        scale, factor, atom = term.scale, term.factor, term.atom
        while factor is not None:
            large, small = divided(factor)
            if isinstance(small, Scalar):
                scale *= small
            elif small is not None and size_of(atom, small) < size_of(factor):
                atom = self.call(aten.mul.Tensor, atom, small)
            else:
                break
            factor = large
        return Term(scale, factor, atom)

    def _merged_by_factor(self, terms: Iterable[Term]) -> list[Term]:
        """``P a + P b`` as ``P (a + b)``."""
        groups: dict[fx.Node | None, list[Term]] = {}
        for term in terms:
            groups.setdefault(term.factor, []).append(term)
        merged = groups.pop(None, [])
        for factor, group in groups.items():
            if len(group) > 1:
                bare = [replace(term, factor=None) for term in group]
                group = [Term(1, factor, self._written_small(bare))]
            merged += group
        return merged

    def _merged_by_size(self, terms: list[Term]) -> list[Term]:
        """Small terms added up among themselves before they are broadcast to the rest."""
        groups: dict[tuple[int, ...], list[Term]] = {}
        for term in terms:
            groups.setdefault(_shape_of_terms(term), []).append(term)
        merged = groups.pop(max(groups, key=math.prod))
        for group in groups.values():
            if len(group) > 1 or group[0].factor is not None:
                group = [Term(1, None, self._written_small(group))]
            merged += group
        return merged

    def _written_small(self, terms: list[Term]) -> fx.Node:
        return self.written(self.plus(_shape_of_terms(*terms), terms))


def divided(factor: fx.Node) -> tuple[fx.Node, fx.Node | Scalar | None]:
    """``P q`` as ``(P, q)`` if q is a number or smaller than the product, else ``(P q, None)``."""
    if factor.target is aten.neg.default:
        return args_of(factor)[0], -1
    if factor.target in (aten.div.Tensor, aten.div.Scalar):
        large, small = args_of(factor)
        return (large, 1 / small) if isinstance(small, Scalar) else (factor, None)
    if factor.target in (aten.mul.Tensor, aten.mul.Scalar):
        for large, small in (args_of(factor), args_of(factor)[::-1]):
            if isinstance(small, Scalar):
                return large, small
            if isinstance(small, fx.Node) and size_of(small) < size_of(factor) == size_of(large):
                return large, small
    return factor, None


def is_ones(node: fx.Node) -> bool:
    return node.target in (aten.ones.default, aten.ones_like.default)


def is_zero_there(factor: fx.Node, mask: fx.Node) -> bool:
    """Whether the factor is zero where the mask is: a softmax of what has ``-inf`` there."""
    if factor.target is not aten._softmax.default:
        return False
    whole = args_of(factor)[0]
    return whole.target is aten.masked_fill.Scalar and args_of(whole)[1:] == (mask, -math.inf)


def _is_masked(factor: fx.Node, kept: fx.Node) -> bool:
    """Whether ones with some masked leave the factor as it is."""
    if kept.target is not aten.masked_fill.Scalar:
        return False
    ones, mask, _ = args_of(kept)
    return is_ones(ones) and is_zero_there(factor, mask)


def _cost_of_starting_with(term: Term) -> tuple[bool, bool, bool]:
    """A sum starts from what is there already; matrix products come last, to be added in place."""
    is_product = term.atom.target in (aten.mm.default, aten.bmm.default)
    return is_product, term.factor is not None or term.scale != 1, term.scale != 1


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The node's arguments, which are what its operation makes of them."""
    return node.args


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def size_of(*nodes: fx.Node) -> int:
    """Elements of the nodes' product."""
    return math.prod(broadcast(*map(shape_of, nodes)))


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))


def _shape_of_terms(*terms: Term) -> tuple[int, ...]:
    parts = [part for term in terms for part in (term.atom, term.factor) if part is not None]
    return broadcast(*map(shape_of, parts))


def map_values(values: Any, fn: Callable[[Value], Any]) -> Any:
    """``fn`` of every node and sum in nested arguments."""
    if isinstance(values, (fx.Node, Sum)):
        return fn(values)
    if isinstance(values, (tuple, list)):
        return type(values)(map_values(value, fn) for value in values)
    if isinstance(values, dict):
        return {key: map_values(value, fn) for key, value in values.items()}
    return values


def _leaves(values: Any) -> Iterator[Value]:
    found: list[Value] = []
    map_values(values, found.append)
    return iter(found)


def _key(target: Any, args: Any, kwargs: Any) -> Hashable:
    if target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in args):
        return target, frozenset(args)
    return target, _frozen(args), _frozen(kwargs)


def _frozen(value: Any) -> Any:
    """Arguments as a key; 1, 1.0 and True are different arguments."""
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), value)
