"""The Hessian of a classifier of handwritten digits in SciPy's solvers, every number checked.

Trains a small network on scikit-learn's digits, hands the Hessian of its training loss to SciPy's
`eigsh` and `cg`, and compares what they give with a dense Hessian that plain torch computes row by
row. Ends with a table and a picture, ``output/digits-spectrum.png``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # the picture goes to a file and needs no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import cg, eigsh
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
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
DAMPING = 0.05
TOP = 10


def main(hidden: int = 16, epochs: int = 40, output: Path = Path("output")) -> list[Row]:
    """Print and return the table; exit with a message if a number is not what it must be."""
    torch.manual_seed(0)
    train, test = digits()
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    rows = [fit(model, train, test, epochs)]

    batches = list(DataLoader(TensorDataset(*train), batch_size=128))
    H = HessianOperator(model, LOSS, batches)
    dense, row = dense_hessian(model, *train)
    rows.append(row)
    truth = np.linalg.eigvalsh(dense)[::-1]
    top, row = top_eigenvalues(H, truth)
    rows += [row, *damped_solve(H, dense, gradient(model, *test))]
    rows += averages(model, batches, dense)
    rows += strategies(model, batches, dense)
    picture = output / "digits-spectrum.png"
    draw(truth, top, picture)

    print(f"\n{H!r}\n{len(train[1])} images in batches of 128, the last of {len(batches[-1][1])}\n")
    print_eigenvalues(top, truth)
    print_table(rows)
    print(f"\nThe whole spectrum is drawn in {picture}")
    failed = [row.what for row in rows if not row.holds]
    if failed:
        raise SystemExit("not as it must be: " + "; ".join(failed))
    return rows


# -- what the operator is put through -----------------------------------------------------------


def top_eigenvalues(H: HessianOperator, truth: np.ndarray) -> tuple[np.ndarray, Row]:
    """The largest eigenvalues, descending, by SciPy's Lanczos on the operator as it is."""
    A = H.linearize()  # the parameters stay as they are: prepare once what all products share
    with Stopwatch() as watch, progress("eigsh", "products") as bar:
        top = eigsh(counted(A, bar), k=TOP, which="LA", return_eigenvectors=False)
    top = np.sort(top)[::-1]
    worst = float(np.max(np.abs(top / truth[:TOP] - 1)))
    return top, at_most("eigsh: ten eigenvalues, worst against dense", worst, 1e-10, watch)


def damped_solve(H: HessianOperator, dense: np.ndarray, b: np.ndarray) -> list[Row]:
    """``(H + damping I) x = b``, with the gradient ``b`` of the loss on new images.

    This is the product with the inverse that influence functions ask for. cg wants a positive
    definite matrix: the damping has to outweigh the negative eigenvalues of the Hessian.
    """
    A = H.linearize() + DAMPING * Identity.like(H)
    with Stopwatch() as watch, progress("cg", "products") as bar:
        x, info = cg(counted(A, bar), b, rtol=1e-9)
    true_product = dense @ x + DAMPING * x  # cg's own residual is updated, and drifts
    return [
        at_most("cg: damped solve, info (0 is converged)", info, 0),
        at_most("cg: damped solve, true residual by dense", distance(true_product, b), 1e-8, watch),
    ]


def averages(model: nn.Module, batches: list[Any], dense: np.ndarray) -> list[Row]:
    """One product batch by batch, of the full empirical loss, and of another average."""
    v = np.random.default_rng(0).standard_normal(len(dense))
    with Stopwatch() as full_watch:
        full = HessianOperator(model, LOSS, batches, mode="full") @ v
    with Stopwatch() as batch_watch:
        by_samples = HessianOperator(model, LOSS, batches) @ v
    with Stopwatch() as alike_watch:
        # Another matrix: here each image of the small last batch counts more than the others.
        alike = HessianOperator(model, LOSS, batches, average=BATCHES) @ v
    return [
        at_most("full empirical loss, against dense", distance(full, dense @ v), 1e-12, full_watch),
        at_most("batch averaged, against full", distance(by_samples, full), 1e-12, batch_watch),
        at_least("batches weighted alike, against full", distance(alike, full), 1e-3, alike_watch),
    ]


def strategies(model: nn.Module, batches: list[Any], dense: np.ndarray) -> list[Row]:
    """One product by each of two ways to differentiate twice."""
    reverse = HessianOperator(model, LOSS, batches, strategy=ReverseOverReverse())
    forward = HessianOperator(model, LOSS, batches, strategy=ForwardOverReverse())
    v = np.random.default_rng(1).standard_normal(len(dense))
    forward @ v  # torch loads its forward-mode rules at their first use; that is not timed
    with Stopwatch() as watch_r:
        by_reverse = reverse @ v
    with Stopwatch() as watch_f:
        by_forward = forward @ v
    error_r, error_f = distance(by_reverse, dense @ v), distance(by_forward, by_reverse)
    return [
        at_most("reverse-over-reverse, against dense", error_r, 1e-12, watch_r),
        at_most("forward-over-reverse, against reverse", error_f, 1e-12, watch_f),
    ]


# -- the model, and what plain torch says of it -------------------------------------------------

Labelled = tuple[Tensor, Tensor]
"""Images ``(n, 64)`` in float64 and their classes ``(n,)``."""


def digits() -> tuple[Labelled, Labelled]:
    """Four fifths of the images to train on, one fifth to test."""
    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, classes, test_size=0.2, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return (train_x, train_y), (test_x, test_y)


def fit(model: nn.Module, train: Labelled, test: Labelled, epochs: int) -> Row:
    """Train with Adam; the row is the accuracy on images not trained on."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True)
    with Stopwatch() as watch, progress("training", "epochs", epochs) as bar:
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                optimizer.step()
            bar.update()
    x, y = test
    accuracy = (model(x).argmax(1) == y).double().mean().item()
    return at_least(f"training: accuracy on {len(y)} other images", accuracy, 0.9, watch)


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> tuple[np.ndarray, Row]:
    """The matrix ``(n, n)`` for all data at once: each entry of the gradient, differentiated."""
    parameters = list(model.parameters())
    entries = parameters_to_vector(
        torch.autograd.grad(LOSS(model(x), y), parameters, create_graph=True)
    )
    rows = []
    with Stopwatch() as watch, progress("dense", "rows", len(entries)) as bar:
        for entry in entries:
            row = torch.autograd.grad(entry, parameters, retain_graph=True)
            rows.append(parameters_to_vector(row).numpy())
            bar.update()
    dense = np.stack(rows)
    return dense, at_most("dense Hessian: asymmetry", distance(dense, dense.T), 1e-12, watch)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """Of the loss, ``(n,)``; the entries in the order of the operator's."""
    gradients = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    return parameters_to_vector(gradients).numpy()


# -- progress, time, table, picture -------------------------------------------------------------


def progress(what: str, unit: str, total: int | None = None) -> tqdm:
    return tqdm(desc=f"{what:<8}", unit=f" {unit}", total=total, mininterval=0.5)


def counted(A: LinearOperator, bar: tqdm) -> LinearOperator:
    """``A``, moving a progress bar on with each product."""

    def apply(V: Tensor) -> Tensor:
        bar.update(V.shape[1])
        return A @ V

    return FromFunction(apply, A.shape, dtype=A.torch_dtype, symmetric=True)


class Stopwatch:
    """The seconds that a with block takes."""

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._start


@dataclass(frozen=True)
class Row:
    """A number, what it must be, and the seconds it took."""

    what: str
    found: float
    must_be: str
    holds: bool
    seconds: float | None


def at_most(what: str, found: float, bound: float, watch: Stopwatch | None = None) -> Row:
    return Row(what, found, f"<= {bound:g}", found <= bound, watch and watch.seconds)


def at_least(what: str, found: float, bound: float, watch: Stopwatch | None = None) -> Row:
    return Row(what, found, f">= {bound:g}", found >= bound, watch and watch.seconds)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative, in the Euclidean norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def print_eigenvalues(top: np.ndarray, truth: np.ndarray) -> None:
    print(f"{'':>4}{'eigsh':>18}{'dense':>18}{'relative error':>18}")
    for i, (found, expected) in enumerate(zip(top, truth, strict=False), start=1):
        print(f"{i:>4}{found:>18.12f}{expected:>18.12f}{abs(found / expected - 1):>18.1e}")


def print_table(rows: list[Row]) -> None:
    print(f"\n{'':<50}{'found':>9}{'must be':>12}{'seconds':>10}")
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.3f}"
        mark = "" if row.holds else "  FAILED"
        print(f"{row.what:<50}{row.found:>9.2g}{row.must_be:>12}{seconds:>10}{mark}")


def draw(truth: np.ndarray, top: np.ndarray, path: Path) -> None:
    """All eigenvalues by rank and size, both signs apart; those of eigsh are circled."""
    rounding = len(truth) * np.finfo(truth.dtype).eps * truth[0]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for sign, name, color in ((1, "positive", "#1f5f99"), (-1, "negative", "#d1632a")):
        sizes = np.sort(sign * truth[sign * truth > rounding])[::-1]
        axes.plot(range(1, len(sizes) + 1), sizes, ".", color=color, ms=4)
        i = len(sizes) // 8
        side = "left" if sign > 0 else "right"  # of the curve, where there is room
        axes.text(i, sizes[i] * 2.5**sign, f"{len(sizes)} {name}", color=color, ha=side)
    axes.plot(range(1, TOP + 1), top, "o", ms=9, mfc="none", mec="black")
    axes.text(4, 3 * top[3], f"the {TOP} that eigsh found")
    axes.axhline(DAMPING, color="gray", lw=0.8, ls="--")
    axes.text(axes.get_xlim()[1], 1.15 * DAMPING, "damping", color="gray", ha="right")
    zeros = np.count_nonzero(np.abs(truth) <= rounding)
    axes.set_title(
        f"Hessian of a digits classifier: {len(truth)} eigenvalues, {zeros} of them zero"
    )
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="size of eigenvalue")
    axes.set_ylim(1e-10 * truth[0], 10 * truth[0])
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    main()
