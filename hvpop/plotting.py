"""Pictures of results that are readable without a caption; needs the extra ``plot``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .operators import Layout
from .spectrum import Density, DiagonalEstimate, Eigenpairs, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_convergence", "plot_density", "plot_eigenvalues", "plot_eigenvector"]


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
    >>> A = Diagonal(torch.linspace(0, 1, 100, dtype=torch.float64))
    >>> plot_density(spectral_density(A)).get_xlabel()
    'eigenvalue'
    """
    ax = _axes(ax, 6.4, 4.0)
    x = _numbers(density.grid)
    single = 1 / (density.order * density.width * (2 * torch.pi) ** 0.5)
    top = density.value.max().item()
    bottom = min(single / 5, top / 10)
    high = _numbers(density.high.clamp(min=bottom / 10))
    low = _numbers(density.low.clamp(min=bottom / 10))
    ax.fill_between(x, low, high, color="C0", alpha=0.25, linewidth=0, label="95 % confidence band")
    value = _numbers(density.value.clamp(min=bottom / 10))
    ax.plot(x, value, color="C0", label="density")
    ax.axhline(single, color="0.5", linewidth=0.8, linestyle=":", label="height of one eigenvalue")
    if eigenvalues is not None:
        marks = _numbers(eigenvalues.eigenvalues)
        ax.plot(
            marks, [0.02] * len(marks), "|", color="C3", markersize=11, markeredgewidth=1.4,
            transform=ax.get_xaxis_transform(), label=f"{len(marks)} eigenvalues found",
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(bottom, 3 * top)
    ax.set_xlim(x[0], x[-1])
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("share of eigenvalues per unit (log scale)")
    steps, count = density.nodes.shape
    ax.set_title(f"Density of {density.order} eigenvalues ({count} probes, {steps} steps each)")
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
    ax = _axes(ax, 6.4, 4.0)
    values = eigenpairs.eigenvalues.flip(0)
    errors = eigenpairs.residuals.flip(0)
    rank = list(range(1, len(values) + 1))
    for sign, colour, text in ((1, "C0", "positive"), (-1, "C3", "negative")):
        mine = [i for i, value in enumerate(values.tolist()) if (value >= 0) == (sign > 0)]
        if mine:
            ax.errorbar(
                [rank[i] for i in mine], _numbers(values[mine]), yerr=_numbers(errors[mine]),
                fmt="o", color=colour, capsize=3, label=text,
            )  # fmt: skip
    size = values.abs()
    if values.min() > 0 and size.max() > 20 * size.min():
        ax.set_yscale("log")
    elif values.min() < 0:
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        ax.legend(frameon=False)
    if len(rank) <= 30:
        ax.set_xticks(rank)
    ax.set_xlabel("rank, largest first")
    ax.set_ylabel("eigenvalue, with its residual as error bar")
    ax.set_title(
        f"{len(rank)} eigenvalues: {eigenpairs.status}, {eigenpairs.products} products\n"
        f"largest residual {errors.max().item():.1e}"
    )
    return ax


class SolverResult(Protocol):
    """What a solver returns, as far as a picture needs it."""

    history: Tensor  # (steps, ...)
    products: int


def plot_convergence(
    result: Eigenpairs | Estimate | DiagonalEstimate | SolverResult, *, ax: Axes | None = None
) -> Axes:
    """How the error went down: against products for a spectrum, against steps for a solver.

    Parameters
    ----------
    result
        Anything from `hvpop.spectrum` but a density, or a result of `hvpop.solvers`.
    ax : matplotlib Axes, optional
        Where to draw; a new figure if not given. Returned.
    """
    ax = _axes(ax, 6.4, 4.0)
    if isinstance(result, Eigenpairs):
        _draw_eigenpairs(ax, result)
    elif isinstance(result, Estimate):
        _draw_estimate(ax, result)
    elif isinstance(result, DiagonalEstimate):
        _draw_diagonal(ax, result)
    else:
        _draw_solve(ax, result)
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
    ax = _axes(ax, 6.4, 1.6 + 0.28 * len(rows))
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


def _draw_eigenpairs(ax: Axes, result: Eigenpairs) -> None:
    known = [entry for entry in result.history if entry[1] < float("inf")]
    ax.semilogy([entry[0] for entry in known], [entry[1] for entry in known], ".-", color="C0")
    ax.set_xlim(0, 1.03 * result.products)
    ax.set_xlabel("products")
    ax.set_ylabel("largest residual |A v - lambda v| (log scale)")
    k = result.eigenvalues.shape[0]
    ax.set_title(f"{k} eigenpairs: {result.status} after {result.products} products")


def _draw_estimate(ax: Axes, result: Estimate) -> None:
    known = [entry for entry in result.history if entry[2] < float("inf")]
    counts = [entry[0] for entry in known]
    sign = -1.0 if result.value < 0 else 1.0
    values = [sign * entry[1] for entry in known]
    low = [value - entry[2] for value, entry in zip(values, known, strict=True)]
    high = [value + entry[2] for value, entry in zip(values, known, strict=True)]
    ax.fill_between(counts, low, high, color="C0", alpha=0.25, linewidth=0, label="95 % band")
    ax.plot(counts, values, ".-", color="C0", label="estimate")
    ax.axhline(result.value, color="0.6", linewidth=0.8)
    ax.set_xlabel("products")
    ax.set_ylabel("estimate")
    half = (result.high - result.low) / 2
    ax.set_title(f"{result.value:.5g} ± {half:.1g}: {result.status}, {result.products} products")
    ax.legend(frameon=False)


def _draw_diagonal(ax: Axes, result: DiagonalEstimate) -> None:
    known = [entry for entry in result.history if entry[2] < float("inf")]
    ax.plot([entry[0] for entry in known], [entry[2] / entry[1] for entry in known], ".-")
    ax.set_ylim(bottom=0.0)
    ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g} %")
    ax.set_xlabel("products")
    ax.set_ylabel("half-widths of the 95 % intervals\nas a part of the diagonal's norm")
    n = result.value.shape[0]
    ax.set_title(f"Diagonal of {n} entries: {result.status}, {result.products} products")


def _draw_solve(ax: Axes, result: SolverResult) -> None:
    history = result.history.reshape(result.history.shape[0], -1).cpu().double()
    columns = history.shape[1]
    for i in range(columns):
        text = "residual" if columns == 1 else f"residuals of {columns} systems"
        ax.semilogy(
            range(len(history)), _numbers(history[:, i]), color="C0", linewidth=1,
            alpha=1.0 if columns == 1 else 0.6, label=text if i == 0 else None,
        )  # fmt: skip
    targets = getattr(result, "targets", None)
    if isinstance(targets, Tensor):
        for i, target in enumerate(sorted(set(targets.reshape(-1).tolist()))):
            ax.axhline(
                target, color="0.5", linewidth=0.8, linestyle=":", label=None if i else "target"
            )
    ax.set_xlabel("steps")
    ax.set_ylabel("residual norm (log scale)")
    ends = ", ".join(sorted(_words(getattr(result, "status", ""))))
    ax.set_title(
        f"{columns} system{'s' if columns > 1 else ''}: {ends}, {result.products} products"
    )
    ax.legend(frameon=False)


def _words(status: object) -> set[str]:
    """The different words in a status, which is one or a nest of tuples of them."""
    if isinstance(status, tuple):
        return set().union(*(_words(part) for part in status))
    return {str(status)}


_MOST_ROWS = 40


def _largest(rows: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """All rows in order, or of very many the largest and the sum of the others."""
    if len(rows) <= _MOST_ROWS:
        return rows
    shown = sorted(range(len(rows)), key=lambda i: -rows[i][1])[: _MOST_ROWS - 1]
    others = [row for i, row in enumerate(rows) if i not in set(shown)]
    rest = (f"{len(others)} others", sum(r[1] for r in others), sum(r[2] for r in others))
    return [*(rows[i] for i in sorted(shown)), rest]


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hvpop[plot]'") from error
    new: Axes = plt.subplots(figsize=(width, height), layout="constrained")[1]
    return new


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.detach().cpu().tolist()]
