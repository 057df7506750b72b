"""What lock-step buys: one block product per step where SciPy takes one product per column."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpop import Damped, FromFunction, LinearOperator
from hvpop.solvers import cg

from .problems import normal, tiny_hessian


def counted(A: LinearOperator, passes: list[int]) -> LinearOperator:
    """The same matrix, noting how many columns each of its passes multiplies."""

    def apply(V: Tensor) -> Tensor:
        passes.append(V.shape[1])
        product: Tensor = A @ V
        return product

    return FromFunction(apply, A.shape, dtype=A.torch_dtype, symmetric=True)


def test_sixteen_right_hand_sides_share_their_passes() -> None:
    """SciPy makes one pass for each product; how much time that is, the benchmarks tell."""
    H = tiny_hessian()
    eigenvalues = torch.linalg.eigvalsh(H.to_dense())
    A = Damped(H, float(1e-2 * eigenvalues[-1] - eigenvalues[0]))
    B = normal(H.shape[0], 16)
    ours: list[int] = []
    theirs: list[int] = []
    result = cg(counted(A, ours), B, rtol=1e-6)
    assert result.converged
    for b in B.numpy().T:
        x, info = scipy.sparse.linalg.cg(counted(A, theirs), np.ascontiguousarray(b), rtol=1e-6)
        assert info == 0
        assert np.linalg.norm(b - A @ x) <= 1.01e-6 * np.linalg.norm(b)
    assert sum(ours) <= 1.3 * sum(theirs)  # true residuals are checked, for a product a column
    assert len(ours) <= 0.12 * len(theirs)
