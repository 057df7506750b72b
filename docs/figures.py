"""The drawn pictures of the pages, in docs/images: ``python docs/figures.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT))

from hvpop import HessianOperator  # noqa: E402
from hvpop.spectrum import spectral_density  # noqa: E402
from tests.test_layers import LAYERS, LEVEL, MODULES, imported, part_of  # noqa: E402

ROOT_PACKAGE = ROOT / "hvpop"


def density() -> None:
    """Of a classifier before and after training."""
    torch.manual_seed(0)
    x = torch.randn(600, 10).double()
    y = (x[:, :4] + 0.3 * torch.randn(600, 4)).argmax(1)
    model, loss = (
        nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 4)).double(),
        nn.CrossEntropyLoss(),
    )
    H = HessianOperator(model, loss, [(x, y)])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for ax, title in zip(axes, ("at random weights", "after training"), strict=True):
        found = spectral_density(H, steps=80, max_products=640, width=0.004)
        grid, value = found.grid.numpy(), found.value.numpy()
        ax.fill_between(grid, found.low.numpy(), found.high.numpy(), alpha=0.25, linewidth=0)
        ax.plot(grid, value, linewidth=1.2)
        ax.set(yscale="log", ylim=(1e-3, 3e2), title=title, xlabel="eigenvalue")
        ax.axvline(0.0, color="0.5", linewidth=0.8, linestyle=":")
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=25)

        def closure(optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            return value

        optimizer.step(closure)
    axes[0].set_ylabel("share of eigenvalues per unit")
    figure.savefig(IMAGES / "theory-density.png", dpi=110)


def indefinite() -> None:
    """The loss (ab - 1)^2 / 2 and where its Hessian has a negative eigenvalue."""
    a, b = np.meshgrid(np.linspace(-2.2, 2.2, 300), np.linspace(-2.2, 2.2, 300))
    figure, ax = plt.subplots(figsize=(5.4, 4.6), layout="constrained")
    determinant = a**2 * b**2 - (2 * a * b - 1) ** 2
    ax.contourf(a, b, determinant < 0, levels=[0.5, 1.5], colors=["C1"], alpha=0.3)
    ax.contour(
        a, b, (a * b - 1) ** 2 / 2, levels=np.geomspace(0.02, 12, 10), colors="C0", linewidths=0.9
    )
    w = np.linspace(1 / 2.2, 2.2, 100)
    ax.plot(w, 1 / w, "k", linewidth=1.6, label="loss zero: ab = 1")
    ax.plot(-w, -1 / w, "k", linewidth=1.6)
    ax.plot(0, 0, "rx", markersize=9, label="saddle: eigenvalues −1 and 1")
    ax.fill([], [], color="C1", alpha=0.3, label="a negative eigenvalue")
    ax.set(xlabel="weight a", ylabel="weight b", aspect="equal")
    ax.legend(loc="upper left", fontsize=8)
    figure.savefig(IMAGES / "theory-indefinite.png", dpi=110)


def arrows() -> set[tuple[str, str]]:
    """Which part imports which."""
    found = set()
    for path in MODULES:
        package = ["hvpop", *path.relative_to(ROOT_PACKAGE).parent.parts]
        for name in imported(path.read_text(encoding="utf-8"), package):
            target = [*name.split("."), ""][1]
            if target in LEVEL and target != part_of(path):
                found.add((part_of(path), target))
    return found


def architecture() -> None:
    """Parts by layer, highest on top, and an arrow for each import but those of the lowest row."""
    there = {part_of(path) for path in MODULES}
    high = sorted((level for level in LAYERS if level > 0), reverse=True)
    low = [p for level in sorted(LAYERS, reverse=True) if level <= 0 for p in LAYERS[level]]
    levels = [[p for p in LAYERS[level] if p in there] for level in high] + [low]
    place = {
        part: ((i + 0.5) / len(parts) * 9, -row * 1.25)
        for row, parts in enumerate(levels)
        for i, part in enumerate(parts)
    }
    figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    for one, other in sorted(arrows()):
        if other not in low:
            ax.annotate(
                "", place[other], place[one], zorder=1,
                arrowprops={"arrowstyle": "-|>", "color": "0.6", "shrinkA": 14, "shrinkB": 14, "linewidth": 0.8},
            )  # fmt: skip
    for part, (x, y) in place.items():
        ax.text(
            x, y, part, ha="center", va="center", fontsize=11, zorder=2,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": "#e4e8ee" if part in low else "#d6e6f7", "edgecolor": "0.4"},
        )  # fmt: skip
    ax.set(xlim=(0, 9), ylim=(-len(levels) * 1.25 + 0.5, 0.7))
    ax.axis("off")
    figure.savefig(IMAGES / "architecture.png", dpi=110)


if __name__ == "__main__":
    density()
    indefinite()
    architecture()
