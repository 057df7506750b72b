"""The Hessian of a classifier of handwritten digits in SciPy's solvers, every number checked.

Trains a small network on scikit-learn's digits, takes the Hessian of its training loss through
SciPy's `eigsh` and `cg`, and compares what comes out with a dense Hessian that plain torch
computes row by row. Ends with a table and a picture, `output/digits-spectrum.png`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # a picture in a file; no display needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import cg, eigsh
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from hvpop import (
    BATCHES,
    ForwardOverReverse,
    FromFunction,
    HessianOperator,
    Identity,
    LinearOperator,
    ReverseOverReverse,
)

LOSS = nn.CrossEntropyLoss()
TOP = 10
DAMPING = 0.05


def main(hidden: int = 16, epochs: int = 40, output: Path = Path("output")) -> Report:
    """Run the demo; raise SystemExit if a number is not what it has to be."""
    report = Report()
    torch.manual_seed(0)
    train, test = digits()
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    with report.timed("training"):
        fit(model, train, epochs)
    report.accuracy = float((model(test[0]).argmax(1) == test[1]).double().mean())
    report.check(report.accuracy > 0.9, f"accuracy on new images is {report.accuracy:.1%}")

    # In batches of 128 the last one is smaller. H weights it by its samples.
    data = list(DataLoader(TensorDataset(*train), batch_size=128))
    H = HessianOperator(model, LOSS, data)
    print(f"\n{H!r}: {len(train[0])} images in {len(data)} batches, the last of {len(data[-1][0])}")

    with report.timed("dense Hessian"):
        dense = dense_hessian(model, *train)
        truth = torch.linalg.eigvalsh(dense).numpy()

    A = H.linearize()  # the parameters stay as they are from here on, so products may be prepared
    with report.timed("eigsh"), progress("eigsh", "product") as bar:
        top = np.sort(eigsh(counted(A, bar), k=TOP, return_eigenvectors=False))[::-1]
    report.eigenvalues = top, truth[::-1][:TOP]
    report.compare("eigsh, against the dense Hessian", top, truth[::-1][:TOP], 1e-10, "eigsh")

    # What influence functions ask for: the inverse times the gradient of the loss on new images.
    # H has negative eigenvalues, and the damping has to outweigh them for cg.
    report.check(truth[0] + DAMPING > 0, f"H + {DAMPING} I has eigenvalue {truth[0] + DAMPING:.1e}")
    b = gradient(model, *test).numpy()
    with report.timed("cg"), progress("cg", "product") as bar:
        x, info = cg(counted(A + DAMPING * Identity.like(A), bar), b, rtol=1e-9)
    report.check(info == 0, f"cg did not converge, info = {info}")
    product = dense.numpy() @ x + DAMPING * x  # the true residual: no product of hvpop is in it
    report.compare("cg, true residual of (H + 0.05 I) x = b", product, b, 1e-8, "cg")

    # The live operator, batch by batch, against the loss of all images as one function.
    v = torch.randn(H.shape[0], dtype=torch.float64)
    with report.timed("batches"):
        by_samples = H @ v
    with report.timed("full"):
        full = HessianOperator(model, LOSS, data, mode="full") @ v
    equal = HessianOperator(model, LOSS, data, average=BATCHES) @ v
    report.compare("batches by samples, against all data at once", by_samples, full, 1e-12, "full")
    report.compare("... against torch's dense Hessian", by_samples, dense @ v, 1e-12, "batches")
    report.unequal_weights = relative_error(equal, full)
    report.check(report.unequal_weights > 1e-3, "batches with equal weight gave the same matrix")

    with report.timed("reverse"):
        reverse = HessianOperator(model, LOSS, data, strategy=ReverseOverReverse()) @ v
    with report.timed("forward"):
        forward = HessianOperator(model, LOSS, data, strategy=ForwardOverReverse()) @ v
    report.compare("forward- against reverse-over-reverse", forward, reverse, 1e-12, "forward")

    picture = output / "digits-spectrum.png"
    with report.timed("picture"):
        draw(truth, top, picture)
    print(report)
    print(f"\nThe spectrum is drawn in {picture}")
    report.raise_failures()
    return report


# -- the model and its data ---------------------------------------------------------------------


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``(n, 64)`` in float64 and classes ``(n,)``: four fifths to train, one to test."""
    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, classes, test_size=0.2, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return (train_x, train_y), (test_x, test_y)


def fit(model: nn.Module, train: tuple[Tensor, Tensor], epochs: int) -> None:
    """Adam, for as many epochs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True)
    with progress("training", "epoch", epochs) as bar:
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss = LOSS(model(x), y)
                loss.backward()
                optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()


# -- the reference: torch alone, all data at once, row by row -----------------------------------


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``(n, n)``, by differentiating each entry of the gradient."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(LOSS(model(x), y), parameters, create_graph=True)
    entries = parameters_to_vector(grads)
    rows = torch.empty(len(entries), len(entries), dtype=entries.dtype)
    with progress("dense Hessian", "row", len(entries)) as bar:
        for i, entry in enumerate(entries):
            row = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
            rows[i] = parameters_to_vector(row)
            bar.update()
    return rows


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return parameters_to_vector(torch.autograd.grad(LOSS(model(x), y), list(model.parameters())))


# -- progress, checks, table, picture -----------------------------------------------------------


@contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[tqdm]:
    with tqdm(desc=f"{what:<13}", unit=f" {unit}s", total=total, leave=True) as bar:
        yield bar


def counted(A: LinearOperator, bar: tqdm) -> LinearOperator:
    """``A``, advancing a progress bar with each product."""

    def apply(V: Tensor) -> Tensor:
        bar.update(V.shape[1])
        return A @ V

    return FromFunction(apply, A.shape, dtype=A.torch_dtype, symmetric=True)


def relative_error(found: NDArray | Tensor, expected: NDArray | Tensor) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
