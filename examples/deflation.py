"""Composed operators: with the top of the spectrum projected out, what is left comes first.

``P @ H @ P`` with ``P = I - V V'`` is the Hessian outside the span of its top eigenvectors ``V``.
It is one more operator: the largest eigenvalues that `eigsh` finds are the next ones of H.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvpop import HessianOperator, Identity, LowRank


def main(k: int = 5) -> np.ndarray:
    """The eigenvalues ``k + 1`` to ``2 k``, descending."""
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images / 16), torch.from_numpy(classes))
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    H = HessianOperator(model, nn.CrossEntropyLoss(), DataLoader(data, batch_size=256)).linearize()

    top, V = eigsh(H, k=k, which="LA")
    P = Identity.like(H) - LowRank(V)
    deflated = P @ H @ P
    print(deflated)  # a tree: what the expression is made of
    print("symmetric:", deflated.symmetric)

    following = np.sort(eigsh(deflated, k=k, which="LA", return_eigenvectors=False))[::-1]
    at_once = np.sort(eigsh(H, k=2 * k, which="LA", return_eigenvectors=False))[::-1]
    print("\n      P H P            2k of H at once")
    for i, (found, expected) in enumerate(zip(following, at_once[k:], strict=True), start=k + 1):
        print(f"{i:4d}  {found:.12f}   {expected:.12f}")
    error = np.abs(following - at_once[k:]).max() / top.max()
    print(f"largest difference: {error:.1e} of the largest eigenvalue")
    if not error < 1e-10:
        raise SystemExit("the deflated Hessian should have the next eigenvalues of the Hessian")
    return following


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
