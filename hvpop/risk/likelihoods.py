"""The distributions whose negative log likelihoods torch's loss functions are, in what these are handed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..marker import Call
from .terms import settings


class Likelihood(ABC):
    """A distribution of targets for each term, given what the loss is handed for it.

    Parameters
    ----------
    call
        Of the loss function, with all of its settings.
    """

    dim: int | None = None  # of the classes, from the end; None: each entry is a term

    def __init__(self, call: Call) -> None:
        self.given = settings(call)
        self.z = call.input.detach()

    def refusal(self) -> str | None:
        """Why the loss, as it is set, is the likelihood of no distribution of its targets."""
        return None

    def examine(self) -> None:  # noqa: B027 (most are good for any numbers)
        """Raise if the numbers at hand are none of the distribution's."""

    def factor(self) -> Tensor | float:
        """By how much each term is multiplied beside what it counts."""
        return 1.0

    @abstractmethod
    def information(self, s: Tensor) -> Tensor:
        """The Fisher information of every term times s, ``(..., *z.shape)``."""

    @abstractmethod
    def draw(self, uniform: Tensor) -> Tensor:
        """Targets from numbers between 0 and 1, ``(draws, *terms)`` both."""

    @abstractmethod
    def score(self, y: Tensor) -> Tensor:
        """The gradients of the losses of terms for given targets, ``(draws, *z.shape)``."""


class Softmax(Likelihood):
    """Classes of a softmax of logits (`cross_entropy`)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.dim = min(1, self.z.ndim - 1) - self.z.ndim
        self.p = self.z.softmax(self.dim)

    def refusal(self) -> str | None:
        if self.given["label_smoothing"] > 0:
            return "label smoothing, which no draws of labels have as their likelihood"
        soft = self.given["target"].is_floating_point()
        if soft and self.given["weight"] is not None:
            return "class weights of targets that are probabilities"
        return None

    def information(self, s: Tensor) -> Tensor:
        q = self.p * s
        return q - self.p * q.sum(self.dim, keepdim=True)

    def draw(self, uniform: Tensor) -> Tensor:
        assert self.dim is not None
        ends = self.p.movedim(self.dim, -1).double().cumsum(-1).contiguous()
        wanted = (uniform * ends[..., -1]).movedim(0, -1).contiguous()
        drawn = torch.searchsorted(ends, wanted).clamp_max(ends.shape[-1] - 1)
        return drawn.movedim(-1, 0)

    def score(self, y: Tensor) -> Tensor:
        assert self.dim is not None
        index = y.unsqueeze(self.dim)
        minus = -torch.ones_like(index, dtype=self.p.dtype)
        return self.p.expand(len(y), *self.p.shape).scatter_add(self.dim, index, minus)


class Categorical(Softmax):
    """Classes by their log probabilities (`nll_loss`)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.p = self.z.exp()

    def refusal(self) -> str | None:
        return None

    def examine(self) -> None:
        eps = torch.finfo(self.p.dtype).eps
        off = (self.p.sum(self.dim) - 1).abs().max() if self.p.numel() else torch.zeros(())
        if float(off) > 100 * eps * self.p.shape[self.dim or -1]:
            raise ValueError(
                f"nll_loss is handed log probabilities that add up to 1 but for {float(off):.1e}, and so "
                "to no distribution; use cross_entropy, or log_softmax before"
            )

    def information(self, s: Tensor) -> Tensor:
        return self.p * s

    def score(self, y: Tensor) -> Tensor:
        assert self.dim is not None
        index = y.unsqueeze(self.dim)
        return self.p.new_zeros(len(y), *self.p.shape).scatter(self.dim, index, -1.0)


class Normal(Likelihood):
    """A normal distribution of variance 1/2 around each entry (`mse_loss`)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.variance = self.z.new_tensor(0.5)

    def information(self, s: Tensor) -> Tensor:
        return s / self.variance

    def draw(self, uniform: Tensor) -> Tensor:
        normal: Tensor = torch.special.ndtri(uniform)
        return self.z + self.variance.sqrt() * normal.to(self.z)

    def score(self, y: Tensor) -> Tensor:
        return (self.z - y) / self.variance


class NormalOfVariance(Normal):
    """A normal distribution of given variance (`gaussian_nll_loss`)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        var = self.given["var"]
        if isinstance(var, Tensor):
            var = var.detach()
            if var.ndim == self.z.ndim - 1:
                var = var[..., None]
        self.variance = torch.as_tensor(var).to(self.z).clamp_min(self.given["eps"])

    def refusal(self) -> str | None:
        var = self.given["var"]
        if isinstance(var, Tensor) and var.requires_grad:
            return "a variance that depends on parameters, too"
        return None


class Laplace(Likelihood):
    """A Laplace distribution of scale 1 around each entry (`l1_loss`)."""

    def information(self, s: Tensor) -> Tensor:
        return s

    def draw(self, uniform: Tensor) -> Tensor:
        side = uniform - 0.5
        return self.z - (side.sign() * torch.log1p(-2 * side.abs())).to(self.z)

    def score(self, y: Tensor) -> Tensor:
        return (self.z - y).sign()


class BernoulliOfLogits(Likelihood):
    """Bits by their logits (`binary_cross_entropy_with_logits`)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.p = self.z.sigmoid()

    def refusal(self) -> str | None:
        if self.given.get("pos_weight") is not None:
            return "pos_weight, which no draws of bits have as their likelihood"
        return None

    def factor(self) -> Tensor | float:
        weight: Tensor | None = self.given["weight"]
        return 1.0 if weight is None else weight.detach()

    def information(self, s: Tensor) -> Tensor:
        return self.p * (1 - self.p) * s

    def draw(self, uniform: Tensor) -> Tensor:
        return (uniform < self.p).to(self.z)

    def score(self, y: Tensor) -> Tensor:
        return self.p - y


class Bernoulli(BernoulliOfLogits):
    """Bits by their probabilities (`binary_cross_entropy`)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.p = self.z

    def information(self, s: Tensor) -> Tensor:
        return s / (self.p * (1 - self.p))

    def score(self, y: Tensor) -> Tensor:
        return (self.p - y) / (self.p * (1 - self.p))


class Poisson(Likelihood):
    """Counts by their rates, or by the logarithms of these (`poisson_nll_loss`)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.log: bool = self.given["log_input"]
        self.rate = self.z.exp() if self.log else self.z

    def information(self, s: Tensor) -> Tensor:
        return self.rate * s if self.log else s / self.rate

    def draw(self, uniform: Tensor) -> Tensor:
        """The least count that the distribution function reaches the number at, by bisection."""
        rate = self.rate.double()
        low = torch.full_like(rate, -1.0)
        high = (rate + 40 * rate.sqrt() + 60).ceil()
        for _ in range(math.ceil(math.log2(float(high.max()) + 2))):
            middle = ((low + high) / 2).floor()
            reached = torch.special.gammaincc(middle + 1, rate) >= uniform
            high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
        return high.to(self.z)

    def score(self, y: Tensor) -> Tensor:
        return self.rate - y if self.log else 1 - y / self.rate


LIKELIHOODS: dict[Callable[..., Any], type[Likelihood]] = {
    F.cross_entropy: Softmax,
    F.nll_loss: Categorical,
    F.mse_loss: Normal,
    F.gaussian_nll_loss: NormalOfVariance,
    F.l1_loss: Laplace,
    F.binary_cross_entropy_with_logits: BernoulliOfLogits,
    F.binary_cross_entropy: Bernoulli,
    F.poisson_nll_loss: Poisson,
}


def likelihood_of(call: Call) -> Likelihood:
    """The distribution that a loss function is the negative log likelihood of, or why there is none."""
    kind = LIKELIHOODS.get(call.loss)
    name = getattr(call.loss, "__name__", repr(call.loss))
    if kind is None:
        raise ValueError(_NONE.format(name))
    found = kind(call)
    reason = found.refusal()
    if reason is not None:
        raise ValueError(_NONE.format(f"{name} with {reason},"))
    return found


_NONE = (
    "{} is not the negative log likelihood of a distribution of its targets, so that there is no Fisher "
    "matrix of it; take GaussNewtonOperator, which needs none, or a loss that is a likelihood"
)


@dataclass(frozen=True)
class Counter:
    """Random numbers that are a function of where they are used (Salmon et al. 2011).

    Whatever asks for number ``s`` of entry ``entry`` of sample ``sample`` gets the same.
    """

    seed: int

    def uniform(self, sample: Tensor, entry: Tensor, draws: int) -> Tensor:
        """Numbers between 0 and 1, ``(draws, *sample.shape)``, float64."""
        x = _mixed(_mixed(torch.full_like(sample, self.seed)) + sample)
        x = _mixed(x + entry)
        draw = torch.arange(draws, device=x.device).reshape(-1, *[1] * x.ndim)
        return (_shifted(_mixed(x + draw), 11).double() + 0.5) * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), in wrapping arithmetic."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shifted to the right, zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


# as signed numbers of 64 bits
_GOLDEN, _FIRST, _SECOND = (
    x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
