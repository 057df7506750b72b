"""The Fisher matrix of an empirical risk as a linear operator, exact or by draws of targets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import reduce
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..exchange import guarded
from ..marker import Call, Cutting
from ..operators import crossing
from ..risk import EmpiricalRisk, terms
from ..risk.likelihoods import Counter, likelihood_of
from ..risk.losses import Loss
from ..risk.samples import Positioned
from ..strategies import HVPStrategy
from ..strategies.base import grad_enabled
from ..strategies.by_rows import ByRows
from ..strategies.parted import Parted, Tensors
from ..strategies.through_outputs import ThroughOutputs, Times
from .live import Live
from .rows import SecondMoment
from .space import multiplier, to_point

Sums = tuple[Tensor, float]
"""A sum over batches, and that of their weights."""


class FisherOperator(Live):
    """The Fisher information matrix of the distribution that a model's loss is the likelihood of.

    The weighted mean over the data's inputs of ``E[g g']``, with g the gradient of the loss of one
    term, and its target drawn from the model: classes from the softmax for cross entropy, normal
    numbers around the outputs for squares, bits, counts. The data's own targets count only where the
    loss ignores or weights some. Of batches it is the same for every split of the data. It is all
    else that a `HessianOperator` is: live, linearized, in blocks.

    Parameters
    ----------
    model, loss, data, strategy, average, params, seed
        As in `GaussNewtonOperator`. The loss has to call one of torch's own functions: `cross_entropy`,
        `nll_loss`, `mse_loss`, `gaussian_nll_loss` of fixed variance, `l1_loss`, `poisson_nll_loss`,
        `binary_cross_entropy`, with or without logits. Their module forms do.
    samples : int, optional
        How many targets are drawn for each term; exact if None. Draws are a function of ``seed`` and
        of the place of a sample in the data: the same for any size of batches and number of columns.

    Raises
    ------
    ValueError
        For a loss that is no likelihood (label smoothing, ``pos_weight``, Huber, focal), or reaches
        parameters past its outputs (a penalty, a learned variance).

    Notes
    -----
    Exact, a product costs what one of Gauss-Newton does, and equals it where the distribution has z
    as its natural parameter: cross entropy, squares, bits by logits, counts by the logarithm of their
    rate (Martens 2020). It does not for probabilities or rates as outputs. By draws the expectation
    is the exact matrix, and the error falls as ``samples ** -0.5``: see `sampling_error`.

    Examples
    --------
    >>> import torch
    >>> from hvpop import FisherOperator
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    >>> data = [(X, torch.zeros(2, 1, dtype=torch.float64))]
    >>> FisherOperator(model, torch.nn.MSELoss(), data).to_dense()
    tensor([[2., 2.],
            [2., 4.]], dtype=torch.float64)
    """

    def __init__(
        self, model: nn.Module, loss: Loss, data: Any, *, samples: int | None = None, **options: Any
    ) -> None:
        self._which(samples)
        super().__init__(model, loss, data, **options)

    def _which(self, samples: int | None = None) -> None:
        if samples is not None and (
            isinstance(samples, bool) or not isinstance(samples, Integral) or samples < 1
        ):
            raise ValueError(f"samples must be an integer > 0, or None for exact, got {samples!r}")
        self.samples = None if samples is None else int(samples)

    def _build(self, risk: EmpiricalRisk, strategy: HVPStrategy | None) -> None:
        self._seed = risk.seed
        super()._build(risk.batchwise() if self.samples is None else risk.positioned(), strategy)

    def _matrix(self, strategy: HVPStrategy) -> HVPStrategy:
        if self.samples is None:
            return ThroughOutputs(strategy, _Exact())
        return ThroughOutputs(strategy, SecondMoment(_Draws(self.samples, self._seed)))

    def sampling_error(self, v: Any) -> Any:
        """The standard error of ``v' F v`` that comes from drawing targets, of a vector or of columns.

        From the spread over draws of each term, which are independent: an interval of 1.96 of it
        covers the exact form in 95 % of all seeds, unless a few terms make up all of it (counts of
        small rates: in 91 % with 40 draws, in 94 % with 160). A pass over the data, at the cost of
        ``J v``.

        Parameters
        ----------
        v : Tensor or ndarray
            ``(n,)`` or ``(n, k)``.

        Returns
        -------
        Tensor or ndarray
            Shape ``()`` or ``(k,)``, float64.

        Raises
        ------
        ValueError
            If less than two targets are drawn: one has no spread.
        """
        return self.sampling_error_over(v, lambda work: [work()])

    def sampling_error_over(
        self, v: Any, collect: Callable[[Callable[[], Sums]], list[Sums]]
    ) -> Any:
        """`sampling_error` of data that several processes hold, whose sums are collected."""
        samples = self.samples or 0
        if samples < 2:
            raise ValueError(
                f"{self!r}: the spread over draws takes at least two, samples=2 or more"
            )
        numpy = not isinstance(v, Tensor)
        V = torch.as_tensor(v).to(self.device, crossing.working_dtype(self.torch_dtype))
        if V.shape[:1] != (self.shape[1],) or V.ndim > 2:
            raise ValueError(
                f"{self!r} expects shape ({self.shape[1]},) or ({self.shape[1]}, k), got {tuple(V.shape)}"
            )
        found = collect(lambda: guarded(lambda: self._spread(V.reshape(len(V), -1), samples)))
        variance = torch.stack([one for one, _ in found]).sum(0).to(self.device)
        weight = sum(one for _, one in found) if self.risk.average.normalized else 1.0
        error = (variance.sqrt() / weight).reshape(V.shape[1:])
        return error.cpu().numpy() if numpy else error

    def _spread(self, V: Tensor, samples: int) -> Sums:
        """The variances of the forms of some columns, ``(k,)``, not divided by the square of the weight."""
        draws, (risk, point, state) = _Draws(samples, self._seed), self._place()
        multiply = multiplier(to_point(V, self.layout, point))
        total, weight = torch.zeros(V.shape[1], dtype=torch.float64, device=V.device), 0.0
        by_rows = self.strategy.plain.within(
            lambda one: ByRows(cast(ThroughOutputs, one).strategy, draws, keeps=False)
        )
        with grad_enabled(), risk.place(point, state), closing(risk.terms()) as passed:
            for term in passed:
                made: Any = by_rows.linearize(term.function, point, state, *term.data)
                forms = multiply(made.push)[0].reshape(V.shape[1], samples, -1).square()
                spread = forms.double().var(1) / samples  # (k, terms)
                total += term.weight**2 * (made.rows.shares.double().square() * spread).sum(1)
                weight += term.weight
        return total.cpu(), weight

    def _kind(self) -> str:
        return "" if self.samples is None else f"(samples={self.samples})"


class _Piece:
    """The terms of one call of a loss function, and the distribution of their targets."""

    def __init__(self, parted: Parted, call: Call, slope: Tensor) -> None:
        self.likelihood = likelihood_of(call)
        if slope.requires_grad:
            raise ValueError(
                f"the loss is a function of what {call.loss.__name__} returns that is no multiple of it, "
                "as a focal loss is, and so no negative log likelihood; take GaussNewtonOperator"
            )
        self.share = terms.shares(call, slope) * self.likelihood.factor()
        self.output = next(i for i, leaf in enumerate(parted.leaves) if leaf is call.input)

    def over(self, per_term: Tensor) -> Tensor:
        """Of ``(..., *terms)``, as wide as the outputs are."""
        dim = self.likelihood.dim
        return per_term if dim is None else per_term.unsqueeze(dim)


class _OfCalls:
    """What is made of the distributions that a loss calls."""

    cutting = Cutting(watching=True, at_calls=True)

    def prove(self, parted: Parted) -> None:
        for call, _ in terms.reaching(parted.calls, parted.loss):
            likelihood_of(call).examine()

    def _pieces(self, parted: Parted) -> list[_Piece]:
        reaching = terms.reaching(parted.calls, parted.loss)
        pieces = [_Piece(parted, call, slope) for call, slope in reaching]
        parted.refuse_beside()
        return pieces


class _Exact(_OfCalls):
    """``B``, the Fisher information of each term in the outputs, by what it counts."""

    def __call__(self, parted: Parted) -> Times:
        pieces = self._pieces(parted)

        def times(s: Tensors, k: int | None) -> Tensors:
            found = [torch.zeros_like(t) for t in s]
            for piece in pieces:
                t = piece.likelihood.information(s[piece.output])
                found[piece.output] = found[piece.output] + piece.over(piece.share) * t
            return found

        return times


class _Draws(_OfCalls):
    """Makes rows of a batch: the gradients of its terms for targets that are drawn."""

    def __init__(self, samples: int, seed: int) -> None:
        self._samples, self._counter = samples, Counter(seed)

    def __call__(self, parted: Parted) -> Drawn:
        pieces, batch = self._pieces(parted), parted.args[1]
        if not isinstance(batch, Positioned):
            raise ValueError("targets are drawn batch by batch")
        return Drawn(pieces, batch.place, self._counter, self._samples)


class Drawn:
    """A row for each draw of each term: the gradient of its loss for the target drawn."""

    def __init__(self, pieces: list[_Piece], place: Tensor, counter: Counter, samples: int) -> None:
        self._pieces, self.samples = pieces, samples
        places = [_places(piece.share, place, j) for j, piece in enumerate(pieces)]
        self._targets = [
            piece.likelihood.draw(counter.uniform(*at, samples))  # (samples, *terms)
            for piece, at in zip(pieces, places, strict=True)
        ]
        self.shares = torch.cat([piece.share.reshape(-1) for piece in pieces])  # (terms,)
        self.weights = (self.shares / samples).repeat(samples)
        self.count = self.weights.numel()

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor:
        lead = () if k is None else (k,)
        found = []
        for piece, targets in zip(self._pieces, self._targets, strict=True):
            likelihood, t = piece.likelihood, tangents[piece.output].unsqueeze(len(lead))
            parts = []
            for y in targets.split(_at_once(t)):
                products = likelihood.score(y) * t
                summed = products if likelihood.dim is None else products.sum(likelihood.dim)
                parts.append(summed.reshape(*lead, len(y), -1))
            found.append(torch.cat(parts, -2))
        return torch.cat(found, -1).reshape(*lead, -1)

    def spread(self, u: Tensor, k: int | None = None) -> Tensors:
        lead = () if k is None else (k,)
        found: dict[int, list[Tensor]] = {}
        sizes = [piece.share.numel() for piece in self._pieces]
        parts = u.reshape(*lead, self.samples, -1).split(sizes, -1)
        for piece, targets, part in zip(self._pieces, self._targets, parts, strict=True):
            own = part.reshape(*lead, self.samples, *piece.share.shape)
            at_once = _at_once(piece.likelihood.z.expand(*lead, *piece.likelihood.z.shape))
            for y, w in zip(targets.split(at_once), own.split(at_once, len(lead)), strict=True):
                part = (piece.over(w) * piece.likelihood.score(y)).sum(len(lead))
                found.setdefault(piece.output, []).append(part)
        return [reduce(torch.add, found[i]) for i in range(len(found))]


def _at_once(outputs: Tensor) -> int:
    """How many draws are worked on together: a few megabytes of them."""
    return max(1, 2**19 // max(outputs.numel(), 1))


def _places(share: Tensor, place: Tensor, call: int) -> tuple[Tensor, Tensor]:
    """Of each term the sample that it is of, and which of the sample's it is."""
    n = len(place)
    if share.numel() % max(n, 1) or not share.ndim:
        raise ValueError(
            f"the terms of a batch of {n} samples must run over them along their first dimension, got "
            f"shape {tuple(share.shape)}, so that targets cannot be drawn by sample"
        )
    each = share.numel() // n
    entry = torch.arange(each, device=place.device) + call * 2**40
    return (
        place.repeat_interleave(each).reshape(share.shape),
        entry.repeat(n).reshape(share.shape),
    )
