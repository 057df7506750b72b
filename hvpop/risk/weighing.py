"""How much each batch counts: told by the loss, or proven by losses of batches put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..exchange import Exchange
from ..graph import is_alone
from ..interception import Table
from ..marker import Cut, Cutting
from .averaging import Average
from .batches import arrays_inside
from .divisors import DivisorWatch
from .fingerprint import checksum
from .laws import Pair, divisor
from .losses import BatchLoss, checked_batch_loss, guesses_of, rule_of, weight_of
from .samples import READINGS, Reading
from .settings import settings_of
from .terms import divisor as divisor_of

Weight = Callable[[Any], float]
"""A batch -> how much it counts."""

FIRST = 16
"""So many batches are each put together with the one before; later ones two by two."""

SMALL = 4096
"""Bytes of an array up to which its values are looked at before each product, not only its version."""


@dataclass(frozen=True)
class Place:
    """Where losses are compared: ``function(point, state, batch, seed)``, and the modules in it.

    ``live`` is the same function with the modes that modules are in when it is called.
    """

    function: Callable[..., Tensor]
    live: Callable[..., Tensor]
    point: dict[str, Tensor]
    state: dict[str, Tensor]
    seed: Tensor
    modules: Sequence[nn.Module]


class Weigher:
    """Weighs the batches of a risk, and sees that the weights are right.

    A mean over w samples obeys ``(w1 l1 + w2 l2)/(w1 + w2) = l(both)``, a sum ``l1 + l2 = l(both)``.
    Where a loss does not say what it divides by, that is looked at before a product counts on it:
    for each batch with the one before, without derivatives, again whenever loss or batches have
    changed. A weight is computed anew at each product.
    """

    def __init__(self, average: Average, batch_loss: BatchLoss, alone: bool = True) -> None:
        self._alone = alone  # whether the batches of one pass are all that there are
        self._average, self._batch_loss = average, checked_batch_loss(batch_loss)
        self._watch = DivisorWatch()
        self._proof: _Proof | None = None
        self._warned = False
        self._ruled = average.weight is not None  # as far as a pass has shown
        self._evaluated = self._reached = False

    def weighed(
        self, batches: Iterable[tuple[Any, Any]], model: nn.Module, place: Callable[[], Place]
    ) -> Iterator[tuple[Any, float]]:
        """Batches with their weights, from pairs: as the user holds them (or None), and as they are used."""
        self._evaluated = self._reached = False
        rule = self._average.weight or rule_of(self._batch_loss, model)
        self._ruled = rule is not None
        if rule is not None:
            for _, batch in batches:
                yield batch, _checked(rule(batch))
            return
        proof = self._current(model)
        previous: Any = None  # the last batch that counts, kept as long as it may be asked for
        single: tuple[Any, Any] | None = None  # the last two, if the last was not put together
        waiting: list[Any] = []  # the first batch, until the second is there
        asked = yielded = False
        for i, (held, batch) in enumerate(batches):
            proof.several |= i > 0 or not self._alone
            counts = _checked(proof(batch, place)) > 0
            asked = proof.asks(i, held)
            if counts and previous is not None:
                single = None if asked or not proof.changed else (previous, batch)
                if asked:
                    self._prove(proof, previous, batch, place(), self._unit(proof, i, yielded))
            if counts:
                previous = None if proof.settled else batch
            waiting.append(batch)
            if i == 0 and proof.weight is None:
                continue
            while waiting:
                ready = waiting.pop(0)
                yielded = True
                yield ready, _checked(proof(ready, place))
                self.refuse()
        if single is not None and not proof.settled:
            self._prove(proof, *single, place())
        if waiting and asked and not self._alone:  # the others are elsewhere
            self._prove_by_parts(proof, waiting[0], place)
        for batch in waiting:
            yield batch, _checked(proof(batch, place))

    def _prove_by_parts(self, proof: _Proof, batch: Any, place: Callable[[], Place]) -> None:
        """As for two batches, by the halves of a single one; a single sample has none."""
        for reading in READINGS:
            for first, second in _halves(reading, batch):
                self._prove(proof, first, second, place())
                return

    @property
    def table(self) -> Table:
        """What watches the loss, for `hvpop.interception`."""
        known = self._ruled or guesses_of(self._batch_loss) is not None
        return {} if known else self._watch.table

    def observe(self, value: Tensor, params: dict[str, Tensor]) -> None:
        """Take note of a loss, evaluated for derivatives by ``params``."""
        if value.requires_grad and not (
            is_alone(value) and all(value is not p for p in params.values())
        ):
            self._evaluated = self._reached = True
        elif torch.is_grad_enabled() and any(p.requires_grad for p in params.values()):
            self._evaluated = True

    def refuse(self) -> None:
        """Raise if evaluations so far have shown that batches are not weighted right."""
        if self._watch.found is not None and self._proof is not None and self._proof.several:
            raise ValueError(_DIVIDES.format(self._watch.found))

    def refuse_constants(self) -> None:
        """Raise if no loss of a whole pass depended on a parameter."""
        if self._evaluated and not self._reached:
            raise ValueError(UNREACHED)

    def _current(self, model: nn.Module) -> _Proof:
        """What is known of the loss as it is set now."""
        settings = settings_of(self._batch_loss), model.training
        if self._proof is None or self._proof.settings != settings:
            self._watch.found, self._watch.trusted = None, False
            self._proof = _Proof(settings, self._batch_loss, model)
        return self._proof

    def _unit(self, proof: _Proof, i: int, yielded: bool) -> str | None:
        """What weights told by calls would be measured in, at a batch; None: they would not go with others.

        Others are those in use in this pass already, which are proven as far as all were looked at,
        and those of other processes.
        """
        if not self._alone:
            return None
        if not yielded:
            return "its own"
        return "as before" if proof.weight is not None and i < FIRST else None

    def _prove(
        self, proof: _Proof, first: Any, second: Any, place: Place, unit: str | None = None
    ) -> None:
        self._proof = None  # one that fails, or is broken off, begins anew
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the loss says them again in the product
            outcome = proof.examine(first, second, place)
            if unit and outcome in _DOUBTS and proof.counts_by_calls(first, second, place, unit):
                outcome = "counted" if outcome == "coupled" else "mean"
                self._watch.found, self._watch.trusted = None, True
        if outcome == "sum":
            raise ValueError(_ADDS_UP)
        self._proof = None if outcome == "divisor" else proof
        if outcome == "mean" and self._watch.found is not None:
            self._watch.found, self._watch.trusted = None, True  # and yet it is a mean over samples
        self.refuse()
        if outcome == "divisor":
            raise ValueError(
                _DIVIDES.format(self._watch.found or "something else than its number of samples")
            )
        if (outcome in _DOUBTS or outcome == "counted") and not self._warned:
            self._warned = True
            known = outcome == "counted"
            said = _COUNTED if known else _ASSUMED.format(_DOUBTS[outcome])
            warnings.warn(said, stacklevel=3)


UNREACHED = (
    "no parameter reaches the loss: no graph leads to any, so its Hessian would be zero; look for "
    "detach(), .data, .item() or torch.no_grad() in the model and the loss"
)
_ADDS_UP = (
    "the loss adds up its samples, as with reduction='sum' (that of two batches put together is the "
    "sum of theirs), which average=SAMPLES cannot turn into a mean; use a mean, or average=TOTAL for "
    "the Hessian of the sum"
)
_DIVIDES = (
    "the loss divides by {}, which differs from batch to batch and cannot be told from outside; pass "
    "the loss as torch.nn.CrossEntropyLoss(...) or functools.partial(F.cross_entropy, ...), or "
    "average=Average(weight=...) with a function that returns the divisor of a batch"
)
_ASSUMED = (
    "batches are weighted by their number of samples, which is an assumption: {}; if the loss divides "
    "by something else, pass average=Average(weight=...) with a function that returns the divisor of "
    "a batch"
)
_COUPLED = (
    "the loss of two batches put together is no mean of theirs, whatever their weights (samples see "
    "each other, or several means are added), so the operator is the mean of the batches' Hessians"
)
_COUNTED = f"batches are weighted by what the call of their loss divides by: {_COUPLED}"
_DOUBTS = {
    "coupled": _COUPLED,
    "apart": (
        "the batches cannot be put together to see what their loss divides by (they differ in shapes or "
        "constants, or hold objects that are not known)"
    ),
}


class _Proof:
    """What batches put together have shown of one loss, as it is set."""

    def __init__(self, settings: Any, batch_loss: BatchLoss, model: nn.Module) -> None:
        self.settings = settings
        self.several = False  # batches: of one the weight does not matter
        self.weight: Weight | None = None
        self._reading: Reading | None = None
        self.settled = False  # nothing more can be told
        self._assumed: Weight = lambda batch: weight_of(batch_loss, model, batch)
        guesses = guesses_of(batch_loss)
        self._guesses: list[Weight] = [partial(guess, model) for guess in guesses or ()]
        self._seen: dict[int, Any] = {}
        self.changed = False  # the batch looked at last
        self._per_term: float | None = None  # the weight, if calls tell what batches divide by

    def __call__(self, batch: Any, place: Callable[[], Place] | None = None) -> float:
        if self._per_term is not None and place is not None:
            terms = Losses(place()).divisor(batch)
            if terms is None:
                raise ValueError(_DIVIDES.format("what one call of torch says, and then does not"))
            return self._per_term * terms
        return (self.weight or self._assumed)(batch)

    def counts_by_calls(self, first: Any, second: Any, place: Place, unit: str) -> bool:
        """Whether the loss is one call of torch's, which says what it divides by; taken from now on."""
        losses = Losses(place)
        terms = [losses.divisor(batch) for batch in (first, second)]
        if None in terms or not terms[0]:
            return False
        self._per_term = 1.0 if unit == "its own" else self(first) / terms[0]
        return True

    def asks(self, i: int, held: Any) -> bool:
        """Whether to put a batch together with the one before: one was not seen yet as it is."""
        if self.settled:
            return False
        before, look = self.changed, _look(held)
        self.changed = self._seen.get(i) != look
        self._seen[i] = look
        return (self.changed or before) and (i < FIRST or i % 2 == 1)

    def examine(self, first: Any, second: Any, place: Place) -> str:
        """Put two batches together: "mean", "perhaps", "sum", "divisor", or a reason to doubt.

        "nothing" if losses are not numbers, or all zero: the product will say why, or that is right.
        """
        situations = [Losses(place)]
        if any(m.training for m in place.modules):  # samples see each other, or are random
            situations.append(Losses(place, evaluating=True))
        near = Losses(place, evaluating=len(situations) > 1, near=True)
        tried: list[Losses] = []
        verdicts: list[str] = []
        for losses in (*situations, near):
            if losses is near and (not verdicts or verdicts[0] == "neither"):
                break
            try:
                losses(first), losses(second)
            except Exception:  # which a product meets, too, or which is of the other situation
                continue
            tried.append(losses)
            verdicts = self._verdicts(losses, first, second) or verdicts
            if verdicts and verdicts[-1] in ("mean", "sum"):
                return verdicts[-1]
        if situations[0] not in tried:
            return "nothing"
        if not verdicts:
            return self._apart(tried[-1], first, second)
        if verdicts[0] == "unsure":
            return self._settle("apart")
        if verdicts[0] != "neither":
            return verdicts[0]
        return self._divisor(tried[-1], first, second) or self._settle("coupled")

    def _verdicts(self, losses: Losses, first: Any, second: Any) -> list[str]:
        """What each reading of the batches says, up to one that is sure."""
        found: list[str] = []
        for reading in [self._reading] if self._reading else READINGS:
            pair = losses.pair(reading, first, second)
            if pair is None:
                continue
            for weight in self._weights(reading):
                weights = weight(first), weight(second)
                verdict: str = "neither" if min(weights) <= 0 else pair.verdict(*weights)
                if verdict == "perhaps" and not self._assumes(weights, first, second):
                    verdict = "unsure"  # what speaks for other weights than those at work
                if verdict == "mean":
                    self._reading, self.weight = reading, self.weight or weight
                if verdict in ("mean", "sum"):
                    return [*found, verdict]
                found.append(verdict)
        return found

    def _weights(self, reading: Reading) -> list[Weight]:
        if self.weight is not None:
            return [self.weight]
        if self._guesses:
            return self._guesses
        return [lambda batch: float(reading.count(batch) or self._assumed(batch))]

    def _assumes(self, weights: tuple[float, float], first: Any, second: Any) -> bool:
        """Whether two batches count in this proportion as long as nothing is proven."""
        mine, others = weights[0] * self(second), weights[1] * self(first)
        return abs(mine - others) <= 1e-9 * max(mine, others)

    def _divisor(self, losses: Losses, first: Any, second: Any) -> str | None:
        """Whether the loss is a mean with other weights, or a sum beside something constant."""
        found: set[str] = set()
        for reading in [self._reading] if self._reading else READINGS:
            for pieces in _pieces(reading, first, second):
                pairs = [losses.pair(reading, pieces[i], pieces[j]) for i, j in _TWO_OF_THREE]
                if all(pairs) and (said := divisor(*(p for p in pairs if p is not None))):
                    found.add(said)
            if found:
                break
        return found.pop() if len(found) == 1 and "neither" not in found else None

    def _apart(self, losses: Losses, first: Any, second: Any) -> str:
        """What parts of each batch tell, where the two cannot be put together."""
        found = []
        for whole in (first, second):
            for reading in READINGS:
                halves = next(_halves(reading, whole), None)
                pair = halves and losses.pair(reading, *halves)
                if not pair:
                    continue
                weights = [float(reading.count(half) or 0) for half in halves or ()]
                found.append(pair.verdict(*weights))
                if found[-1] == "sum":
                    return "sum"
                break
        alike = _shapes(first) == _shapes(second) != ()
        if alike and len(found) == 2 and all(v in ("mean", "perhaps") for v in found):
            return "mean"
        return self._settle("apart")

    def _settle(self, doubt: str) -> str:
        self.settled, self.weight = True, self.weight or self._assumed
        return doubt


_TWO_OF_THREE = ((0, 1), (1, 2), (0, 2))


class Losses:
    """The losses of batches at a place.

    With every module in eval mode if ``evaluating``: what couples samples or draws random numbers is
    mostly gone there, and what the loss divides by is not. At a point beside the live one if
    ``near``: there no losses are zero, or all alike.
    """

    def __init__(self, place: Place, *, evaluating: bool = False, near: bool = False) -> None:
        self._place, self._near = place, near
        self._function = place.live if evaluating else place.function
        self._modes = [(m, False) for m in place.modules] if evaluating else []
        self._eps = max(torch.finfo(p.dtype).eps for p in place.point.values())
        self._known: dict[int, tuple[Any, float]] = {}

    def pair(self, reading: Reading, first: Any, second: Any) -> Pair | None:
        """The losses of two batches and of both; None if there is no such batch."""
        try:
            both = self(reading.joined(first, second))
            losses = self(first), self(second), both
        except Exception:  # batches that do not fit together, in the ways of any model
            return None
        slack = max(30 * _SINGLE, 8 * self._eps) * max(map(abs, losses))
        w, u = (float(reading.count(b) or 0) for b in (first, second))
        if w + u > 0 and Pair(*losses, slack).verdict(w, u) not in ("mean", "sum"):
            # Rounding inside the model, or random numbers, show in another order of the samples.
            slack += 3 * abs(self(reading.joined(second, first)) - both)
        return Pair(*losses, slack)

    def divisor(self, batch: Any) -> float | None:
        """What the loss divides by, where the whole of it is one call of a loss function of torch's."""
        cut = Cut(Cutting(watching=True))
        with cut, suppress(Exception):
            value = self._evaluated(batch)
            return next((divisor_of(c) for c in cut.calls if c.value is value), None)
        return None

    def __call__(self, batch: Any) -> float:
        if id(batch) not in self._known:
            self._known[id(batch)] = batch, float(self._evaluated(batch).detach())
        return self._known[id(batch)][1]

    def _evaluated(self, batch: Any) -> Tensor:
        with torch.inference_mode(False), _InModes(self._modes):
            if not self._near:
                try:
                    with torch.no_grad():
                        return self._value(self._place.point, batch)
                except RuntimeError:
                    pass  # a loss that differentiates by its inputs
            with torch.enable_grad():
                return self._value(self._point(), batch)

    def _value(self, point: dict[str, Tensor], batch: Any) -> Tensor:
        place = self._place
        return self._function(point, place.state, batch, place.seed)

    def _point(self) -> dict[str, Tensor]:
        point = self._place.point
        if not self._near:
            return point
        generator = torch.Generator().manual_seed(0)

        def moved(p: Tensor) -> Tensor:
            step = torch.randn(p.shape, generator=generator, device="cpu").to(p)
            return (p.detach() + step * (0.1 * p.detach().abs() + 0.03)).requires_grad_()

        return {name: moved(p) for name, p in point.items()}


_SINGLE = torch.finfo(torch.float32).eps


class _InModes(Exchange):
    """Modules in train or eval mode as given."""

    def __init__(self, modes: list[tuple[nn.Module, bool]]) -> None:
        super().__init__()
        self._modes = modes

    def _change(self) -> None:
        for module, mode in self._modes:
            if module.training != mode:
                self._set(module, "training", mode)


def _halves(reading: Reading, batch: Any) -> Iterator[tuple[Any, Any]]:
    """A batch in two parts, cut at several places."""
    n = reading.count(batch) or 0
    for at in dict.fromkeys((n // 2, n // 3, n - n // 3)):
        if 0 < at < n:
            yield reading.part(batch, slice(0, at)), reading.part(batch, slice(at, n))


def _pieces(reading: Reading, first: Any, second: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Three batches out of two."""
    if reading.count(first) is None or reading.count(second) is None:
        return
    for whole, other in ((first, second), (second, first)):
        for a, b in _halves(reading, whole):
            yield a, b, other
            for c, d in _halves(reading, b):
                yield a, c, d


def _look(batch: Any) -> Any:
    """What changes when a batch held by the user is replaced or written to."""
    return [_glance(array) for array in arrays_inside(batch)]


def _glance(array: Tensor | np.ndarray) -> Any:
    if isinstance(array, Tensor):
        version = 0 if array.is_inference() else array._version
        place: Any = id(array), version, _shape(array)
        here = array.device.type == "cpu" and array.layout is torch.strided
        plain = here and not (array.requires_grad or array.is_nested)
        return (place, checksum(array)) if plain and array.nbytes <= SMALL else place
    large = array.nbytes > SMALL or array.dtype.hasobject
    return id(array), array.shape if large else checksum(array)


def _shapes(batch: Any) -> tuple[Any, ...]:
    return tuple(map(_shape, arrays_inside(batch)))


def _shape(array: Tensor | np.ndarray) -> tuple[Any, ...]:
    if isinstance(array, Tensor) and array.is_nested:  # of no shape, or of a new one each
        return (array.size(0),)
    return tuple(array.shape)


def _checked(weight: Any) -> float:
    value = float(weight)
    if not (value >= 0 and isfinite(value)):
        raise ValueError(f"a batch has weight {value}; weights must be finite non-negative numbers")
    return value
