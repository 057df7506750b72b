"""Where numbers come from: versions, and fingerprints of the parameters and the data."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from contextlib import closing

import numpy as np
import scipy
import torch
from torch import Tensor

from .. import __version__
from .._torch import content
from ..operators import LinearOperator
from ..risk import EmpiricalRisk
from ..risk.batches import tensors_in


def provenance(H: LinearOperator) -> dict[str, str]:
    """Versions and, of a matrix over data, fingerprints: equal ones are of equal bits."""
    found = {
        "hvpop": __version__,
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": str(H.device),
        "dtype": str(H.torch_dtype).removeprefix("torch."),
    }
    risk = getattr(H, "risk", None)
    if isinstance(risk, EmpiricalRisk):
        found["parameters"] = digest(risk.parameters().values())
        found["other state"] = digest(risk.state().values())
        with closing(risk.terms()) as terms:
            found["data"] = digest(t for term in terms for t in tensors_in(term.data[0]))
    return found


def digest(tensors: Iterable[Tensor]) -> str:
    """Of shapes, dtypes and bits, 16 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
        hashed.update(repr((dense.dtype, tuple(dense.shape))).encode())
        hashed.update(content(dense.cpu().contiguous()))
    return hashed.hexdigest()
