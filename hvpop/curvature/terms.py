"""The terms of which a loss is the weighted mean, and that they are what they are taken for."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..marker import Call, Cutting
from ..risk import terms
from ..risk.batches import tensors_in
from ..risk.fingerprint import sums
from ..risk.function import LossFunction
from ..strategies.parted import Parted, Tensors
from .parts import Part, halves, samples_of
from .rows import Face, Rows, table

Per = Literal["sample", "term"]


class Terms:
    """Makes rows of a batch: the gradients of the terms of which its loss is the weighted mean.

    A term is a sample's own loss, or each number that a loss function of torch's averages. That no
    sample sees another in the model is proven once for a function as it is set. What terms count in
    their batch is seen in every batch, unless the loss is one that torch averages: what is divided by
    hand may go by the data, and one batch has all of its targets where the next one ignores some.
    """

    def __init__(self, per: Per) -> None:
        if per not in ("sample", "term"):
            raise ValueError(f"per must be 'sample' or 'term', got {per!r}")
        self.per = per
        self.cutting = Cutting(watching=True, at_calls=per == "term")
        self._begin(None)
        self._looked_at: object = None

    def _begin(self, known: object) -> None:
        self._known = known  # the function at work, as it is set
        self._laws: list[str] = []  # those that have held of all batches, the likeliest first
        self._apart = False  # whether the model is known to take samples by themselves
        self._seen: set[object] = set()  # what of batches, and of outputs, laws were held against

    def __call__(self, parted: Parted) -> Rows:
        parted.refuse_beside()
        law = self._laws[0] if self._laws else None
        weights = self._weights(parted, law)
        return _rows(self._faces(parted), parted, weights[law or next(iter(weights))])

    def count(self, parted: Parted) -> int:
        """How many rows there are."""
        return self._faces(parted)[0].count

    # -- what they are ----------------------------------------------------------------------------

    def _faces(self, parted: Parted) -> list[Face]:
        if self.per == "term":
            call, z = self._call(parted), parted.outputs[0]
            if terms.by_entry(call):
                return [Face(z.shape, z.numel(), -1 if not z.ndim else None)]
            dim = min(1, z.ndim - 1)
            return [Face(z.shape, z.numel() // max(z.shape[dim], 1), dim)]
        n = samples_of(parted)[1]
        for z in parted.outputs:
            if n > 1 and (not z.ndim or z.shape[0] % n):
                raise ValueError(
                    f"the outputs of a batch of {n} samples must run over them along their first "
                    f"dimension, got shape {tuple(z.shape)}, so that gradients have no rows by sample"
                )
        return [Face(z.shape, n, None) for z in parted.outputs]

    def _weights(self, parted: Parted, law: str | None = None) -> dict[str, Tensor]:
        """What terms may count in their batch, by law (or by this one), the likeliest first."""
        z = parted.outputs[0]
        n = samples_of(parted)[1]
        found: dict[str, Tensor] = {}
        calls = parted.calls if law in (None, _MEAN) else []
        for call, slope in terms.reaching(calls, parted.loss):
            own = terms.shares(call, slope)
            adds = terms.settings(call).get("reduction") == "sum"
            if adds or slope.requires_grad or own.numel() % max(n, 1):
                continue
            own = table(own, n).sum(1) if self.per == "sample" else own.reshape(-1)
            found.setdefault(_MEAN, own / own.sum())
        count = n if self.per == "sample" else sum(f.count for f in self._faces(parted))
        found["mean of samples"] = z.new_full((count,), 1 / max(n, 1))
        found["sum"] = z.new_ones(count)
        return found

    def _call(self, parted: Parted) -> Call:
        found = terms.reaching(parted.calls, parted.loss)
        if len(found) != 1 or found[0][1].requires_grad:
            raise ValueError(
                "the loss is not the value of one loss function of torch's, times a number, so that it is "
                "no mean of terms that are all alike; per='sample' takes each sample's loss as it is"
            )
        return found[0][0]

    # -- the proof --------------------------------------------------------------------------------

    def prove(self, parted: Parted) -> None:
        """See that the terms are what they are taken for; raise if they are not."""
        fn = parted.fn
        if not isinstance(fn, LossFunction):
            raise ValueError("gradients of samples are taken batch by batch")
        if self._looked_at is not fn.now:
            known = fn, None if fn.plain else fn.now.settings()
            if known != self._known:
                self._begin(known)
            self._looked_at = fn.now
        if samples_of(parted)[1] <= 1:
            return  # alone, whatever the law
        if self._apart and self._laws[0] == _MEAN and _averaged(parted):
            return
        seen = tuple(sums(t) for t in (*parted.handed, *tensors_in(parted.args[1])))
        if seen in self._seen:
            return
        parts = halves(parted)
        laws = self._laws or [*self._weights(parted)]
        laws = [law for law in laws if self._holds(law, parted, parts)]
        apart = [True] if self._apart else [part.is_by_itself() for part in parts]
        if not laws or False in apart:
            raise ValueError(_COUPLED.format(_why(parted)))
        self._laws, self._apart = laws, True in apart
        if self._apart:
            if len(self._seen) >= _MANY:
                self._seen.clear()
            self._seen.add(seen)

    def _holds(self, law: str, whole: Parted, parts: list[Part]) -> bool:
        """Whether the rows of a batch's parts are those that they have by themselves."""
        places = [whole, *(part.parted for part in parts)]
        weights = {id(one): self._weights(one, law).get(law) for one in places}

        def vectors(one: Parted, unit: float = 1.0) -> Tensors:
            own = weights[id(one)]
            return [] if own is None else _rows(self._faces(one), one, own, unit).vectors

        counts = weights[id(whole)]
        if counts is None or _drops(self._faces(whole), whole, counts):
            return False
        return all(part.has(vectors) for part in parts)


_MEAN = "mean of terms"

_MANY = 2**14
"""Batches that are remembered to have been seen."""


def _averaged(parted: Parted) -> bool:
    """Whether the loss is what one of torch's functions has averaged, and nothing else."""
    if len(parted.calls) != 1 or parted.calls[0].value is not parted.loss:
        return False
    return terms.settings(parted.calls[0]).get("reduction") == "mean"


def _rows(faces: list[Face], parted: Parted, weights: Tensor, unit: float = 1.0) -> Rows:
    """The gradients of terms of which the loss is the sum by some weights, rounded as one of a unit is."""
    counts = weights > 0  # a mean over nothing is no number, nor are its weights
    scale = torch.where(counts, 1 / weights, 0.0)[:, None]
    scaled = [torch.where(counts[:, None], scale * r, 0.0) for r in _vectors(faces, parted, unit)]
    return Rows(faces, scaled, torch.where(counts, weights, 0.0))


def _vectors(faces: list[Face], parted: Parted, unit: float = 1.0) -> Tensors:
    """The gradient of the loss in the outputs, by rows."""
    places = parted.leaves
    found: tuple[Tensor | None, ...] = (None,) * len(places)
    if parted.loss.requires_grad:
        one = torch.full_like(parted.loss, 1 / unit)
        found = torch.autograd.grad(parted.loss, places, one, retain_graph=True, allow_unused=True)
    parts = zip(faces, found, places, strict=True)
    return [face.rows(torch.zeros_like(z) if g is None else g).mul(unit) for face, g, z in parts]


def _drops(faces: list[Face], parted: Parted, weights: Tensor) -> bool:
    """Whether terms that would count nothing have gradients all the same."""
    nothing = (weights == 0)[:, None]
    if not nothing.any():
        return False
    return any(bool((nothing & (r != 0)).any()) for r in _vectors(faces, parted))


_COUPLED = (
    "a part of a batch by itself has not the gradients that its samples have in the batch, so that they "
    "are no samples' own: {}; GaussNewtonOperator takes a batch as one function"
)


def _why(parted: Parted) -> str:
    fn: Any = parted.fn
    state, batch, seed, *_ = parted.args
    if seed is not None and fn.draws(parted.point, state, batch, seed):
        return "the loss draws random numbers for all of a batch (dropout); use model.eval()"
    return (
        "samples see each other (BatchNorm in train mode, contrastive losses), or the loss is neither a "
        "mean nor a sum over them; use model.eval(), and a loss that is a mean over samples"
    )
