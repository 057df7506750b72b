"""The rows that a batch has in a rectangular matrix: of outputs, or of gradients of a loss's terms."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..marker import AT_MARKS, Cutting
from ..risk import terms
from ..risk.function import LossFunction
from ..risk.samples import READINGS, Reading
from ..strategies.parted import Parted, Tensors
from ..strategies.through_outputs import Times
from .joining import same

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
        self._faces, self._vectors, self.weights = faces, vectors, weights
        self.count = weights.numel()

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor:
        """The products ``(count,)``, or ``(k, count)``, of tangents of the outputs."""
        lead = () if k is None else (k,)
        parts = zip(self._faces, self._vectors, tangents, strict=True)
        found = [(face.rows(t, lead) * r).sum(-1) for face, r, t in parts]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def spread(self, u: Tensor, k: int | None = None) -> Tensors:
        """The cotangents of the outputs in which the rows add up by ``u``."""
        lead = () if k is None else (k,)
        parts = zip(self._faces, self._vectors, strict=True)
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
        return t.reshape(*lead, self.count, -1)

    def entries(self, rows: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
        """The inverse of `rows`."""
        if self.dim is None:
            return rows.reshape(*lead, *self.shape)
        rest = [n for d, n in enumerate(self.shape) if d != self.dim]
        return rows.reshape(*lead, *rest, -1).movedim(-1, self.dim + len(lead))


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

    A term is a sample's own loss, or each number that a loss function of torch's averages. That the
    terms are what they are taken for is proven once for a function as it is set: parts of a batch by
    themselves have the gradients that their samples have in the batch.
    """

    def __init__(self, per: Per) -> None:
        if per not in ("sample", "term"):
            raise ValueError(f"per must be 'sample' or 'term', got {per!r}")
        self.per = per
        self.cutting = Cutting(watching=True, at_calls=per == "term")
        self._law: str | None = None  # of the function at work, if it is proven
        self._known: tuple[LossFunction, Any] | None = None
        self._looked_at: object = None

    def __call__(self, parted: Parted) -> Rows:
        parted.refuse_beside()
        weights = self._weights(parted)
        return _rows(self._faces(parted), parted, weights[self._law or next(iter(weights))])

    def count(self, parted: Parted) -> int:
        """How many rows there are."""
        return self._faces(parted)[0].count

    # -- what they are ----------------------------------------------------------------------------

    def _faces(self, parted: Parted) -> list[Face]:
        if self.per == "term":
            (call,) = self._one_call(parted)
            z = parted.outputs[0]
            if terms.by_entry(call):
                return [Face(z.shape, z.numel(), -1 if not z.ndim else None)]
            dim = min(1, z.ndim - 1)
            return [Face(z.shape, z.numel() // max(z.shape[dim], 1), dim)]
        n = samples_of(parted)[1]
        for z in parted.outputs:
            if not z.ndim or z.shape[0] % n:
                raise ValueError(
                    f"the outputs of a batch of {n} samples must run over them along their first "
                    f"dimension, got shape {tuple(z.shape)}, so that gradients have no rows by sample"
                )
        return [Face(z.shape, n, None) for z in parted.outputs]

    def _weights(self, parted: Parted) -> dict[str, Tensor]:
        """What terms may count in their batch, by law, the likeliest first."""
        z = parted.outputs[0]
        n = samples_of(parted)[1]
        found: dict[str, Tensor] = {}
        calls = self._one_call(parted) if self.per == "term" else parted.calls
        for call in calls:
            if not parted.loss.requires_grad or terms.settings(call).get("reduction") == "sum":
                continue
            own = terms.share(call, parted.loss)
            if own is None or own.numel() % n:
                continue
            own = own.reshape(n, -1).sum(1) if self.per == "sample" else own.reshape(-1)
            found.setdefault("mean of terms", (own / own.sum()).detach())
        count = n if self.per == "sample" else sum(f.count for f in self._faces(parted))
        found["mean of samples"] = z.new_full((count,), 1 / n)
        found["sum"] = z.new_ones(count)
        return found

    def _one_call(self, parted: Parted) -> list[Any]:
        if len(parted.calls) != 1:
            raise ValueError(
                f"the loss calls {len(parted.calls)} loss functions of torch, so that it is no mean of "
                "terms that are all alike; per='sample' takes each sample's loss as it is"
            )
        return parted.calls

    # -- the proof --------------------------------------------------------------------------------

    def prove(self, parted: Parted) -> None:
        """See that the terms are what they are taken for; raise if they are not."""
        fn = parted.fn
        if not isinstance(fn, LossFunction):
            raise ValueError("gradients of samples are taken batch by batch")
        if self._looked_at is fn.now and self._law:
            return
        known = fn, None if fn.plain else fn.now.settings()
        if known != self._known:
            self._known, self._law = known, None
        self._looked_at = fn.now
        reading, n = samples_of(parted)
        if self._law is None and n > 1:
            halves = [slice(0, n // 2), slice(n // 2, n)]
            self._law = self._found(parted, [_Part(parted, reading, n, rows) for rows in halves])

    def _found(self, whole: Parted, parts: list[_Part]) -> str | None:
        """Which law holds for both parts of a batch; None if all gradients are zero."""
        weights, faces = self._weights(whole), self._faces(whole)
        for law in weights:
            outcomes = []
            for part in parts:
                own = self._weights(part.parted)
                if law not in own or own[law].numel() * part.of != weights[law].numel() * part.n:
                    break
                rows = _rows(faces, whole, weights[law])
                theirs = _rows(self._faces(part.parted), part.parted, own[law])
                outcomes.append(part.agrees(rows, theirs))
            if len(outcomes) == len(parts) and all(o is not False for o in outcomes):
                return law if any(outcomes) else None
        raise ValueError(_COUPLED.format(_why(whole)))


class _Part:
    """Some samples of a batch by themselves."""

    def __init__(self, whole: Parted, reading: Reading, n: int, rows: slice) -> None:
        state, batch, *rest = whole.args
        self.whole, self._rows = whole, rows
        self.of, self.n = n, rows.stop - rows.start
        args = state, reading.part(batch, rows), *rest
        self.parted = Parted(whole.fn, whole.point, args, cutting=whole.cutting)

    def agrees(self, rows: Rows, own: Rows) -> bool | None:
        """Whether their rows in the batch are those that they have by themselves; None: all zero."""
        generator = torch.Generator().manual_seed(0)
        count = own.weights.numel()
        u = torch.randn(count, generator=generator, dtype=torch.float64).to(own.weights)
        start = self._rows.start * count // self.n
        among = rows.weights.new_zeros(rows.weights.numel())
        among[start : start + count] = u
        truth = list(self.parted.pull(own.spread(u)).values())
        if not any(bool(t.any()) for t in truth):
            return None
        found = list(self.whole.pull(rows.spread(among)).values())
        thirds = list(self.parted.pull(own.spread(u / 3)).values())
        return same(found, truth, self.whole.point, lambda: [3 * t for t in thirds])


def samples_of(parted: Parted) -> tuple[Reading, int]:
    """How the batch of a parted function is made of samples."""
    batch = parted.args[1]
    for reading in READINGS:
        if n := reading.count(batch):
            return reading, n
    raise ValueError(
        f"a batch of the kind {type(batch).__name__} does not say how it is made of samples, so that "
        "there are no gradients by sample; use batches of tensors that run over samples first"
    )


def _rows(faces: list[Face], parted: Parted, weights: Tensor) -> Rows:
    """The gradients of terms of which the loss is the sum by some weights."""
    places = parted.leaves
    found: tuple[Tensor | None, ...] = (None,) * len(places)
    if parted.loss.requires_grad:
        found = torch.autograd.grad(parted.loss, places, retain_graph=True, allow_unused=True)
    counts = weights > 0  # a mean over nothing is no number, nor are its weights
    scale = torch.where(counts, 1 / weights, 0.0)[:, None]
    vectors = [
        face.rows(torch.zeros_like(z) if g is None else g)
        for face, g, z in zip(faces, found, places, strict=True)
    ]
    scaled = [torch.where(counts[:, None], scale * r, 0.0) for r in vectors]
    return Rows(faces, scaled, torch.where(counts, weights, 0.0))


_COUPLED = (
    "half of a batch by itself has not the gradients that its samples have in the batch, so that they are "
    "no samples' own: {}; GaussNewtonOperator takes a batch as one function"
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
