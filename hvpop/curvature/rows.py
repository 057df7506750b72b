"""The rows that a batch has in a rectangular matrix: of outputs, or of gradients of a loss's terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..marker import AT_MARKS, Call, Cutting
from ..risk import terms
from ..risk.batches import tensors_in
from ..risk.fingerprint import sums
from ..risk.function import LossFunction
from ..risk.samples import READINGS, Reading
from ..strategies.parted import Parted, Tensors
from ..strategies.rounding import agree, nudged, reordered, rounding
from ..strategies.through_outputs import Times
from .joining import COARSEST, same

Per = Literal["sample", "term"]


class Rows:
    """The rows ``r_i' J`` of vectors ``r_i`` in the outputs of a batch.

    Parameters
    ----------
    faces
        How each output is read as rows ``(count, d)``.
    vectors
        ``r``, read so.
    weights
        What each row counts in the batch, ``(count,)``: those of a mean add up to 1.
    """

    def __init__(self, faces: list[Face], vectors: Tensors, weights: Tensor) -> None:
        self._faces, self.vectors, self.weights = faces, vectors, weights
        self.count = weights.numel()

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor:
        """The products ``(count,)``, or ``(k, count)``, of tangents of the outputs."""
        lead = () if k is None else (k,)
        parts = zip(self._faces, self.vectors, tangents, strict=True)
        found = [(face.rows(t, lead) * r).sum(-1) for face, r, t in parts]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def spread(self, u: Tensor, k: int | None = None) -> Tensors:
        """The cotangents of the outputs in which the rows add up by ``u``."""
        lead = () if k is None else (k,)
        parts = zip(self._faces, self.vectors, strict=True)
        return [face.entries(u[..., None] * r, lead) for face, r in parts]


@dataclass(frozen=True)
class Face:
    """How the entries of an output are read as rows."""

    shape: torch.Size
    count: int
    dim: (
        int | None
    )  # that of a row's entries, if it is one of the output's and not all the last ones

    def rows(self, t: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
        """``(*lead, count, d)`` of ``(*lead, *shape)``."""
        if self.dim is not None:
            t = t.movedim(self.dim + len(lead), -1)
        return _table(t, *lead, self.count)

    def entries(self, rows: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
        """The inverse of `rows`."""
        if self.dim is None:
            return rows.reshape((*lead, *self.shape))
        rest = [n for d, n in enumerate(self.shape) if d != self.dim]
        rows = rows.reshape(*lead, *rest, self.shape[self.dim])
        return rows.movedim(-1, self.dim + len(lead))


def _table(t: Tensor, *shape: int) -> Tensor:
    """In a shape with all that is left last, be there no entries at all."""
    return t.reshape(*shape, t.numel() // max(prod(shape), 1))


class Outputs:
    """Makes rows of a batch: every entry of its outputs is one, in the order of the samples."""

    cutting = AT_MARKS

    def __call__(self, parted: Parted) -> OutputRows:
        return OutputRows(parted.outputs)

    def count(self, parted: Parted) -> int:
        """How many rows there are."""
        return sum(z.numel() for z in parted.outputs)


class OutputRows:
    """The entries of outputs: of a single one as they are, of several by sample."""

    def __init__(self, outputs: Tensors) -> None:
        self._shapes = [z.shape for z in outputs]
        samples = {s[0] if s else None for s in self._shapes}
        if len(outputs) > 1 and (len(samples) > 1 or None in samples):
            raise ValueError(
                "the model has several outputs, whose first dimensions are not the same, so that there "
                f"is no order of their entries by sample: shapes {[tuple(s) for s in self._shapes]}"
            )
        self._samples = samples.pop() or 1
        self.count = sum(prod(s) for s in self._shapes)

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor:
        lead = () if k is None else (k,)
        return torch.cat([t.reshape(*lead, self._samples, -1) for t in tangents], -1).reshape(
            *lead, -1
        )

    def spread(self, u: Tensor, k: int | None = None) -> Tensors:
        lead = () if k is None else (k,)
        sizes = [prod(s) // self._samples for s in self._shapes]
        pieces = u.reshape(*lead, self._samples, -1).split(sizes, -1)
        return [p.reshape(*lead, *s) for p, s in zip(pieces, self._shapes, strict=True)]


class Weighed(Protocol):
    """Rows that count something each."""

    count: int
    weights: Tensor

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor: ...

    def spread(self, u: Tensor, k: int | None = None) -> Tensors: ...


class Maker(Protocol):
    """Makes rows of a parted function."""

    cutting: Cutting

    def prove(self, parted: Parted) -> None: ...

    def __call__(self, parted: Parted) -> Weighed: ...


class SecondMoment:
    """``B = sum_i w_i r_i r_i'``, for `ThroughOutputs`."""

    def __init__(self, maker: Maker) -> None:
        self._maker, self.cutting = maker, maker.cutting

    def prove(self, parted: Parted) -> None:
        self._maker.prove(parted)

    def __call__(self, parted: Parted) -> Times:
        rows = self._maker(parted)

        def times(s: Tensors, k: int | None) -> Tensors:
            return rows.spread(rows.weights * rows.gather(s, k), k)

        return times


# -- the terms of a loss -------------------------------------------------------------------------------


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
            own = _table(own, n).sum(1) if self.per == "sample" else own.reshape(-1)
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
        parts = _parts(parted)
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

    def _holds(self, law: str, whole: Parted, parts: list[_Part]) -> bool:
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


class _Part:
    """Some samples of a batch by themselves, of which the loss is that of the batch's outputs."""

    def __init__(self, whole: Parted, reading: Reading, n: int, rows: slice) -> None:
        state, batch, *rest = whole.args
        self.whole, self._of, self._rows = whole, n, rows
        args = state, reading.part(batch, rows), *rest
        handed = [self._among(z) for z in whole.handed]
        self.parted = Parted(whole.fn, whole.point, args, cutting=whole.cutting, handing=handed)

    def _among(self, t: Tensor) -> Tensor | None:
        """What these samples have of what runs over samples first."""
        if not t.ndim or t.shape[0] % self._of:
            return None
        each = t.shape[0] // self._of
        return t[self._rows.start * each : self._rows.stop * each]

    def _pairs(self, whole: Tensors, own: Tensors) -> list[tuple[Tensor, Tensor]] | None:
        """What they have of a batch's tensors beside what they have by themselves, if these fit."""
        pairs = [(self._among(a), b) for a, b in zip(whole, own, strict=False)]
        fit = [(a.reshape(b.shape), b) for a, b in pairs if a is not None and _alike(a, b)]
        return fit if len(fit) == len(whole) == len(own) else None

    def has(self, vectors: Callable[..., Tensors]) -> bool:
        """Whether their rows in the batch, in the outputs, are those that they have by themselves."""

        def found(unit: float = 1.0) -> list[tuple[Tensor, Tensor]] | None:
            return self._pairs(vectors(self.whole, unit), vectors(self.parted, unit))

        pairs = found()
        if pairs is None:
            return False

        def again() -> Tensors:
            """As far away as other units put them."""
            others = [found(unit) or [] for unit in (3.0, 7.0)]
            apart = [
                sum((a - c).abs() + (b - d).abs() for c, d in same_row)
                for (a, b), *same_row in zip(pairs, *others, strict=True)
            ]
            return [b + off for (_, b), off in zip(pairs, apart, strict=True)]

        truth = [b for _, b in pairs]
        eps = rounding(truth)
        tolerance = min(1000 * eps, reordered(eps), COARSEST)
        return agree([a for a, _ in pairs], truth, tolerance, again)

    def is_by_itself(self) -> bool | None:
        """Whether the model makes the same of them in the batch; None if that does not say anything."""
        whole, own = self.whole, self.parted
        pairs = self._pairs(whole.outputs, own.outputs)
        if pairs is None:
            return False
        generator = torch.Generator().manual_seed(0)
        s = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for _, z in pairs]
        among = [torch.zeros_like(z) for z in whole.outputs]
        for (mine, _), t in zip(self._pairs(among, s) or (), s, strict=True):
            mine.copy_(t)

        def made(parted: Parted) -> Tensors:
            return [*(z.detach() for z in parted.outputs), *parted.pull(s).values()]

        def nearby() -> Tensors:
            return made(Parted(own.fn, nudged(own.point), own.args, cutting=own.cutting))

        truth = made(own)
        found = [*(z.detach() for z, _ in pairs), *whole.pull(among).values()]
        if not same(found, truth, own.point, nearby):
            return False
        return True if any(bool(t.any()) for t in truth[len(s) :]) else None


def _alike(a: Tensor, b: Tensor) -> bool:
    """In the same shape, or one sample's of which the model has squeezed one."""
    return a.shape == b.shape or a.numel() == b.numel() == a[0].numel()


def _parts(whole: Parted) -> list[_Part]:
    """A batch in two."""
    reading, n = samples_of(whole)
    # Odd, and no half: what goes by place shows. Coprime to n: no part has the same share of targets
    # ignored, unless that is none or all. A single sample is not what every model is written for.
    odd = (c for c in range(1, n // 2 + 2, 2) if gcd(c, n) == 1)
    cut = min(odd, key=lambda c: (1 in (c, n - c), abs(3 * c - n)))
    try:
        return [_Part(whole, reading, n, s) for s in (slice(0, cut), slice(cut, n))]
    except Exception as error:  # whatever a model does with fewer samples than it expects
        raise ValueError(_APART.format(error)) from error


def samples_of(parted: Parted) -> tuple[Reading, int]:
    """How the batch of a parted function is made of samples."""
    batch = parted.args[1]
    for reading in READINGS:
        if (n := reading.count(batch)) is not None:
            return reading, n
    raise ValueError(
        f"a batch of the kind {type(batch).__name__} does not say how it is made of samples, so that "
        "there are no gradients by sample; use batches of tensors that run over samples first"
    )


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


_APART = (
    "a part of a batch by itself cannot be evaluated ({}), so that it cannot be seen whether samples are by "
    "themselves; layers that look at a batch as a whole need model.eval(); GaussNewtonOperator takes a batch "
    "as one function"
)

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
