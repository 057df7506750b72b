"""What the user may still write to while a linearized operator holds it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..risk import Term
from ..risk.batches import DESCEND, arrays_in, mapped, tensors_in
from ..risk.fingerprint import checksum
from .memory import bytes_of

_WRITTEN = (
    "the data of {} has been written to in place or exchanged since linearize() was called, and is not "
    "copied, so that the product would be of another matrix; call linearize() again, or write to a clone"
)


class Lent:
    """What the batch of a term held when it was first read, to find out whether it was written to.

    torch counts what it writes itself. It does not see what is written through an ndarray: a storage
    that shares its memory with one cannot be resized any longer, and its contents are compared then.
    """

    def __init__(self, term: Term, in_memory: bool) -> None:
        self._versions = _versions(term)
        arrays = arrays_in(term.data) if in_memory else []
        self._contents = [(array, checksum(array)) for array in arrays if _plain(array)]
        self._storages = [a.untyped_storage() for a, _ in self._contents if isinstance(a, Tensor)]
        self._always = any(isinstance(a, np.ndarray) for a, _ in self._contents)

    @property
    def watched(self) -> bool:
        """Whether there is anything that an ndarray may come to share."""
        return bool(self._contents)

    def refuse_written(self, term: Term) -> None:
        """Raise if the batch is another one by now."""
        if _versions(term) != self._versions:
            raise RuntimeError(_WRITTEN.format(term.label))
        self.refuse_shared(term)

    def refuse_shared(self, term: Term) -> None:
        """Raise if something was written through an ndarray."""
        if not self._always and all(map(torch.UntypedStorage.resizable, self._storages)):
            return
        if any(_shared(array) and checksum(array) != before for array, before in self._contents):
            raise RuntimeError(_WRITTEN.format(term.label))


def shared_bytes(term: Term) -> int:
    """The size of what ndarrays share of a batch."""
    arrays = [a for a in arrays_in(term.data) if _plain(a) and _shared(a)]
    return sum(a.nbytes if isinstance(a, np.ndarray) else bytes_of([a]) for a in arrays)


def owned(term: Term) -> Term:
    """The term on copies of what ndarrays share of its batch."""

    def own(node: object) -> object:
        if not isinstance(node, Tensor | np.ndarray):
            return DESCEND
        if not (_plain(node) and _shared(node)):
            return node
        return node.copy() if isinstance(node, np.ndarray) else node.detach().clone()

    return term._replace(data=mapped(own, term.data))


def _plain(array: Tensor | np.ndarray) -> bool:
    """Whether its bytes can be read here, and are the user's to write to."""
    if isinstance(array, np.ndarray):
        return not array.dtype.hasobject
    here = array.device.type == "cpu" and array.layout is torch.strided and not array.is_nested
    return here and type(array) is Tensor and not array.requires_grad


def _shared(array: Tensor | np.ndarray) -> bool:
    return isinstance(array, np.ndarray) or not array.untyped_storage().resizable()


def _versions(term: Term) -> list[tuple[int, int]]:
    """Which tensors, and what they hold; places and seeds, of integers, are made at each pass."""
    return [
        (id(t) if t.is_floating_point() else 0, 0 if t.is_inference() else t._version)
        for t in tensors_in(term.data)
    ]
