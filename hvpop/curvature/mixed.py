"""Mixed second derivatives of an empirical risk: by parameters, and by the inputs of chosen samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from ..risk import EmpiricalRisk, Term
from ..risk.samples import Positioned
from ..strategies import HVPStrategy, ReverseOverReverse
from ..strategies.mixed import AT_INPUTS, Mixed
from ..strategies.parted import Parted, Tensors
from .rows import OutputRows
from .stacked import Stacked


class InputRows(Stacked):
    """``d2 L / dx dtheta``: a row for each entry of the inputs of chosen samples.

    Made by `HessianOperator.mixed`, which returns its transpose.
    """

    _averaged = True

    @classmethod
    def of(cls, risk: EmpiricalRisk, samples: Iterable[int] | None) -> Self:
        operator = cls.__new__(cls)
        operator._samples = None if samples is None else _checked(samples)
        operator._build(risk.positioned(), _Inputs(operator._samples), ReverseOverReverse())
        last = -1 if operator._samples is None else int(operator._samples[-1])
        if last >= operator._seen:
            raise IndexError(
                f"mixed expects samples from 0 to {operator._seen - 1}, in the order of the data, got {last}"
            )
        return operator

    _samples: Tensor | None
    _seen = 0

    def _share(self, count: int, term: Term) -> int:
        place = term.data[0].place
        self._seen += len(place)
        return count // max(len(place), 1) * len(_chosen(place, self._samples))

    def _map_of(self, strategy: HVPStrategy, *, keeps: bool) -> HVPStrategy:
        return Mixed(self._rows)

    def _label(self) -> str:
        return "InputRows" if self._kept is None else "LinearizedInputRows"


class _Inputs:
    """Makes rows of a batch: the entries of the inputs of those of its samples that are chosen."""

    cutting = AT_INPUTS

    def __init__(self, samples: Tensor | None) -> None:
        self._samples = samples

    def __call__(self, parted: Parted) -> _Chosen:
        batch = parted.args[1]
        assert isinstance(batch, Positioned)
        return _Chosen(parted.leaves, _chosen(batch.place, self._samples))

    def none(self, args: tuple[Any, ...]) -> bool:
        """Whether no sample of a batch is chosen."""
        return not len(_chosen(args[1].place, self._samples))

    def count(self, parted: Parted) -> int:
        """How many entries the inputs of all samples of a batch have."""
        return sum(x.numel() for x in parted.leaves)


class _Chosen:
    """The entries of some samples, of several inputs by sample."""

    def __init__(self, leaves: Tensors, index: Tensor) -> None:
        self._shapes, self._index = [x.shape for x in leaves], index
        self._within = OutputRows([x.detach()[index] for x in leaves])
        self.count = self._within.count

    def gather(self, tangents: Tensors, k: int | None = None) -> Tensor:
        dim = 0 if k is None else 1
        return self._within.gather([t.index_select(dim, self._index) for t in tangents], k)

    def spread(self, u: Tensor, k: int | None = None) -> Tensors:
        lead = () if k is None else (k,)
        parts = zip(self._within.spread(u, k), self._shapes, strict=True)
        return [
            u.new_zeros(*lead, *shape).index_copy(len(lead), self._index, part)
            for part, shape in parts
        ]


def _chosen(place: Tensor, samples: Tensor | None) -> Tensor:
    """Which of some places are chosen, by their index."""
    if samples is None:
        return torch.arange(len(place), device=place.device)
    return torch.isin(place, samples.to(place.device)).nonzero()[:, 0]


def _checked(samples: Iterable[int]) -> Tensor:
    given = torch.as_tensor([int(i) for i in samples])
    if not len(given) or int(given.min()) < 0 or len(given.unique()) < len(given):
        raise ValueError(
            f"mixed expects the indices of some samples, each once, got {given.tolist()}"
        )
    return given.sort().values
