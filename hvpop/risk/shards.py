"""One process's share of the data, without the samples that samplers repeat to make shares even."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


def share_of(data: Any) -> Any:
    """``data``, taken out of what Fabric and accelerate wrap it in; loaders give no sample twice."""
    while (inner := _inside(data)) is not data:
        data = inner
    if not isinstance(data, DataLoader):
        return data
    if _is(data.dataset, "IterableDatasetShard"):
        raise TypeError(
            "the data is an IterableDatasetShard of accelerate, which repeats samples to make shares "
            "even, and does not say which; pass a loader of each process's own samples"
        )
    batch_sampler: Any = data.batch_sampler
    if getattr(batch_sampler, "even_batches", False):  # accelerate's BatchSamplerShard
        uneven = copy.copy(batch_sampler)
        uneven.even_batches = False
        return _with(data, uneven)
    sampler = getattr(batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        once = copy.copy(batch_sampler)
        once.sampler = _Once(sampler)
        return _with(data, once)
    return data


def _inside(data: Any) -> Any:
    if _is(data, "DataLoaderDispatcher"):
        raise TypeError(
            "the data is a DataLoaderDispatcher of accelerate, by which one process reads for all, "
            "within collectives of its own; use Accelerator(dataloader_config="
            "DataLoaderConfiguration(dispatch_batches=False)), or a loader with a DistributedSampler"
        )
    if _is(data, "DataLoaderAdapter"):
        return data.base_dataloader
    return data._dataloader if _is(data, "_FabricDataLoader") else data


def _is(thing: Any, name: str) -> bool:
    """Whether a class of a library that need not be there is among those of ``thing``."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def _with(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    own = copy.copy(loader)
    own.__dict__ |= {"batch_sampler": batch_sampler, "_iterator": None}
    return own


class _Once:
    """A `DistributedSampler` without the indices that it repeats at its end."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        all_, step = len(self._sampler.dataset), self._sampler.num_replicas  # type: ignore[arg-type]
        for k, index in enumerate(self._sampler):
            if k * step + self._sampler.rank < all_:
                yield index
