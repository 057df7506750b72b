"""Some samples of a batch by themselves, beside what they are in it."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from ..risk.samples import READINGS, Reading
from ..strategies.parted import Parted, Tensors
from ..strategies.rounding import agree, nudged, reordered, rounding
from .joining import COARSEST, same


class Part:
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

    def pairs(self, whole: Tensors, own: Tensors) -> list[tuple[Tensor, Tensor]] | None:
        """What they have of a batch's tensors beside what they have by themselves, if these fit."""
        pairs = [(self._among(a), b) for a, b in zip(whole, own, strict=False)]
        fit = [(a.reshape(b.shape), b) for a, b in pairs if a is not None and _alike(a, b)]
        return fit if len(fit) == len(whole) == len(own) else None

    def has(self, vectors: Callable[..., Tensors]) -> bool:
        """Whether their rows in the batch, in the outputs, are those that they have by themselves."""

        def found(unit: float = 1.0) -> list[tuple[Tensor, Tensor]] | None:
            return self.pairs(vectors(self.whole, unit), vectors(self.parted, unit))

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
        pairs = self.pairs(whole.outputs, own.outputs)
        if pairs is None:
            return False
        generator = torch.Generator().manual_seed(0)
        s = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for _, z in pairs]
        among = [torch.zeros_like(z) for z in whole.outputs]
        for (mine, _), t in zip(self.pairs(among, s) or (), s, strict=True):
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


def halves(whole: Parted) -> list[Part]:
    """A batch in two."""
    reading, n = samples_of(whole)
    # Odd, and no half: what goes by place shows. Coprime to n: no part has the same share of targets
    # ignored, unless that is none or all. A single sample is not what every model is written for.
    odd = (c for c in range(1, n // 2 + 2, 2) if gcd(c, n) == 1)
    cut = min(odd, key=lambda c: (1 in (c, n - c), abs(3 * c - n)))
    try:
        return [Part(whole, reading, n, s) for s in (slice(0, cut), slice(cut, n))]
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


_APART = (
    "a part of a batch by itself cannot be evaluated ({}), so that it cannot be seen whether samples are by "
    "themselves; layers that look at a batch as a whole need model.eval(); GaussNewtonOperator takes a batch "
    "as one function"
)
