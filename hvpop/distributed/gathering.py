"""Models whose parameters are sharded by FSDP2, made whole for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import _torch


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """While it lasts, a model sharded by FSDP2 (``fully_shard``) has whole, plain parameters.

    Operators made within are exact, and their products hold no collectives of the model's: processes
    may have unequal numbers of batches. Afterwards the model is as it was: sharded, resharding as
    before, without gradients.

    Parameters
    ----------
    model : nn.Module
        One that `fully_shard` was called on, or that holds such; any other is left alone.

    Raises
    ------
    TypeError
        If parameters are distributed in another way (tensor parallel), which is silently wrong for
        second derivatives.

    Notes
    -----
    Each process holds all parameters meanwhile. A linearized operator that has made its first product,
    with its batches in memory, goes on afterwards; a live one is refused there.

    Examples
    --------
    >>> import torch
    >>> from hvpop.distributed import gathered
    >>> model = torch.nn.Linear(2, 1)  # not sharded
    >>> with gathered(model):
    ...     pass
    """
    parts: list[Any] = [m for m in model.modules() if _torch.is_fsdp2(m)]
    before = [_torch.resharding(part) for part in parts]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.set_requires_gradient_sync(False, recurse=False)  # a proof calls backward()
        for part in parts:
            part.unshard()
        for name, p in model.named_parameters():
            if _torch.is_distributed(p):
                raise TypeError(
                    f"gathered expects parameters sharded by FSDP2 alone, got {name} as a "
                    f"{type(p).__name__}; second derivatives through "
                    "tensor-parallel layers are silently wrong: use an unsharded copy of the model"
                )
        yield model
    finally:
        for part, switches in zip(reversed(parts), reversed(before), strict=True):
            part.reshard()
            _torch.set_resharding(part, switches)
