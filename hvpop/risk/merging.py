"""Several batches run as one: concatenated where samples are independent, else vectorized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .empirical import Term
from .function import OfLosses

_PLAIN = (bool, int, float, str, type(None))


def concatenated(terms: Sequence[Term]) -> Term | None:
    """One term with the samples of all, of any batch sizes; None if they do not fit together.

    Right only if the loss is a mean over samples that do not see each other and that run along the
    first dimension of every tensor. The caller has to make sure, by comparing products.
    """
    merged = _merged(terms, torch.cat, _form)
    if merged is None:
        return None
    weight = sum(term.weight for term in terms)
    return Term(terms[0].function, (merged, None), weight, _range(terms))


def form_of(term: Term) -> Any:
    """What batches that fit together have in common: all but the number of their samples."""
    batch = term.data[0]
    if type(batch) in (tuple, list) and all(type(x) is Tensor for x in batch):
        return type(batch), list(map(_form, batch))  # at a fifth of the cost
    leaves, structure = pytree.tree_flatten(batch)
    return structure, list(map(_form, leaves))


def _form(x: Any) -> Any:
    if isinstance(x, Tensor) and x.ndim > 0:
        return x.shape[1:], x.dtype
    return (type(x), x) if isinstance(x, _PLAIN) else object()  # which equals no other


def stacked(terms: Sequence[Term]) -> Term | None:
    """One term with the batches along a new dimension, each a mean of its own (`torch.vmap`).

    Right for every loss that vmap can handle; needs batches of equal shape.
    """
    merged = _merged(terms, torch.stack, lambda x: (x.shape, x.dtype))
    if merged is None:
        return None
    weights = merged_weights(terms)
    return Term(
        OverBatches(terms[0].function), (merged, weights), float(weights.sum()), _range(terms)
    )


def merged_weights(terms: Sequence[Term]) -> Tensor:
    """The weights of some terms, on the device of their data."""
    first = next(x for x in pytree.tree_leaves(terms[0].data[0]) if isinstance(x, Tensor))
    return torch.tensor([term.weight for term in terms], dtype=torch.float64, device=first.device)


class OverBatches(OfLosses):
    """The weighted mean of a function over a leading dimension of its data."""

    def __call__(
        self, params: dict[str, Tensor], state: dict[str, Tensor], batch: Any, weights: Tensor
    ) -> Tensor:
        dims = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, batch)
        over_batches = torch.vmap(self.function, in_dims=(None, None, dims, None))
        losses: Tensor = over_batches(params, state, batch, None)
        weights = weights.to(losses.dtype)
        return (weights * losses).sum() / weights.sum()


def _merged(
    terms: Sequence[Term],
    join: Callable[[list[Tensor]], Tensor],
    form: Callable[[Tensor], Any],
) -> Any:
    """The batches of some terms with their tensors joined, or None if these differ in form."""
    batches = [pytree.tree_flatten(term.data[0]) for term in terms]
    structure = batches[0][1]
    if any(other != structure for _, other in batches):
        return None
    merged: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in batches), strict=True):
        first = leaves[0]
        if isinstance(first, Tensor):
            if not all(isinstance(x, Tensor) and form(x) == form(first) for x in leaves):
                return None
            merged.append(join(list(leaves)))
        elif isinstance(first, _PLAIN) and all(x == first for x in leaves):
            merged.append(first)
        else:
            return None
    return pytree.tree_unflatten(merged, structure)


def _range(terms: Sequence[Term]) -> str:
    first, last = terms[0].label, terms[-1].label
    return first if len(terms) == 1 else f"{first} to {last.removeprefix('batch ')}"
