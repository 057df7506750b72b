"""Pictures of spectra: a density, eigenvalues, and where an eigenvector lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..operators import Layout
from ..operators.wording import counted
from ..spectrum import Density, Eigenpairs
from .common import DENSITY, EIGENPAIRS, INDEX, LAYOUT, axes, expect, numbers, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_density(
    density: Density, eigenvalues: Eigenpairs | None = None, *, ax: Axes | None = None
) -> Axes:
    """The density of the eigenvalues on a log scale, with its band and the eigenvalues known exactly.

    Parameters
    ----------
    density : Density
        From `hvpop.spectrum.spectral_density`.
    eigenvalues : Eigenpairs, optional
        Marked on the axis.
    ax : matplotlib Axes, optional
        Where to draw; a new figure if not given. Returned.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.spectrum import spectral_density
    >>> from hvpop.plotting import plot_density
    >>> A = Diagonal(torch.linspace(0, 1, 100, dtype=torch.float64))
    >>> plot_density(spectral_density(A)).get_xlabel()
    'eigenvalue'
    """
    expect("plot_density", "density", density, DENSITY)
    if eigenvalues is not None:
        expect("plot_density", "eigenvalues", eigenvalues, EIGENPAIRS)
    ax = axes("plot_density", ax)
    x = numbers(density.grid)
    single = 1 / (density.order * density.width * (2 * torch.pi) ** 0.5)
    top = density.value.max().item()
    bottom = min(single / 5, top / 10)
    high = numbers(density.high.clamp(min=bottom / 10))
    low = numbers(density.low.clamp(min=bottom / 10))
    ax.fill_between(x, low, high, color="C0", alpha=0.25, linewidth=0, label="95 % confidence band")
    value = numbers(density.value.clamp(min=bottom / 10))
    ax.plot(x, value, color="C0", label="density")
    ax.axhline(single, color="0.5", linewidth=0.8, linestyle=":", label="height of one eigenvalue")
    if eigenvalues is not None:
        marks = numbers(eigenvalues.eigenvalues)
        ax.plot(
            marks, [0.02] * len(marks), "|", color="C3", markersize=11, markeredgewidth=1.4,
            transform=ax.get_xaxis_transform(), label=f"{counted(len(marks), 'eigenvalue')} found",
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(bottom, 3 * top)
    ax.set_xlim(x[0], x[-1])
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("share of eigenvalues per unit (log scale)")
    nodes, count = density.nodes.shape
    ax.set_title(
        f"Density of {counted(density.order, 'eigenvalue')} "
        f"({counted(count, 'probe')}, {counted(nodes, 'node')} each)"
    )
    ax.legend(frameon=False)
    return ax


def plot_eigenvalues(eigenpairs: Eigenpairs, *, ax: Axes | None = None) -> Axes:
    """The eigenvalues, largest first, with their residuals as error bars.

    Parameters
    ----------
    eigenpairs : Eigenpairs
        From `hvpop.spectrum.eigsh`.
    ax : matplotlib Axes, optional
        Where to draw; a new figure if not given. Returned.
    """
    expect("plot_eigenvalues", "eigenpairs", eigenpairs, EIGENPAIRS)
    ax = axes("plot_eigenvalues", ax)
    if eigenpairs.eigenvalues.numel() == 0:
        say(ax, f"no eigenpairs: {eigenpairs.status}")
        return ax
    values = eigenpairs.eigenvalues.flip(0)
    errors = eigenpairs.residuals.flip(0)
    rank = list(range(1, len(values) + 1))
    for sign, colour, text in ((1, "C0", "positive"), (-1, "C3", "negative")):
        mine = [i for i, value in enumerate(values.tolist()) if (value >= 0) == (sign > 0)]
        if mine:
            ax.errorbar(
                [rank[i] for i in mine], numbers(values[mine]), yerr=numbers(errors[mine]),
                fmt="o", color=colour, capsize=3, label=text,
            )  # fmt: skip
    size = values.abs()
    if values.min() > 0 and size.max() > 20 * size.min():
        ax.set_yscale("log")
    elif values.min() < 0:
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        ax.legend()  # in a frame: its marks look like eigenvalues
    if len(rank) <= 30:
        ax.set_xticks(rank)
    ax.set_xlabel("rank, largest first")
    ax.set_ylabel("eigenvalue, with its residual as error bar")
    ax.set_title(
        f"{counted(len(rank), 'eigenvalue')}: {eigenpairs.status}, "
        f"{counted(eigenpairs.products, 'product')}\n"
        f"largest residual {errors.max().item():.1e}"
    )
    return ax


def plot_eigenvector(
    eigenpairs: Eigenpairs, layout: Layout, index: int = -1, *, ax: Axes | None = None
) -> Axes:
    """Where an eigenvector lives: the share of its squared length in each parameter.

    Parameters
    ----------
    eigenpairs : Eigenpairs
        From `hvpop.spectrum.eigsh`.
    layout : Layout
        The parameters' names and shapes, such as a Hessian's `layout`.
    index : int
        Which column of the eigenvectors; the last belongs to the largest eigenvalue.
    ax : matplotlib Axes, optional
        Where to draw; a new figure if not given. Returned.
    """
    expect("plot_eigenvector", "eigenpairs", eigenpairs, EIGENPAIRS)
    expect("plot_eigenvector", "layout", layout, LAYOUT)
    expect("plot_eigenvector", "index", index, INDEX)
    n, k = eigenpairs.eigenvectors.shape
    if layout.size != n:
        raise ValueError(
            f"plot_eigenvector expects a layout of the {n} entries of the eigenvectors, "
            f"got one of {layout.size}"
        )
    if not -k <= index < k:
        raise IndexError(
            f"plot_eigenvector expects an index of one of {k} eigenvectors, got {index}"
        )
    v = eigenpairs.eigenvectors[:, index].cpu().double()
    squares = v.square() / v.square().sum()
    rows = [
        (name, squares[place].sum().item(), (place.stop - place.start) / n)
        for name, place in layout.slices()
    ]
    rows = _largest(rows)
    ax = axes("plot_eigenvector", ax, 1.6 + 0.28 * len(rows))
    names, shares, sizes = zip(*rows, strict=True)
    places = list(range(len(rows)))
    ax.barh(places, shares, color="C0")
    ax.plot(sizes, places, "|", color="C1", markersize=12, markeredgewidth=2)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlim(0.0, 1.1 * max(*shares, *sizes))
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    ax.set_xlabel("blue bar: share of the squared length\norange mark: share of the parameters")
    eigenvalue = eigenpairs.eigenvalues[index].item()
    ax.set_title(f"Eigenvector of eigenvalue {eigenvalue:.4g}, by parameter")
    return ax


_MOST_ROWS = 40


def _largest(rows: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """All rows in order, or of very many the largest and the sum of the others."""
    if len(rows) <= _MOST_ROWS:
        return rows
    shown = sorted(range(len(rows)), key=lambda i: -rows[i][1])[: _MOST_ROWS - 1]
    others = [row for i, row in enumerate(rows) if i not in set(shown)]
    rest = (f"{len(others)} others", sum(r[1] for r in others), sum(r[2] for r in others))
    return [*(rows[i] for i in sorted(shown)), rest]
