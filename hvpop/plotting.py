"""Pictures of results that are readable without a caption; needs the extra ``plot``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from .operators import Layout
from .solvers import (
    FunctionResult,
    LeastSquaresResult,
    MultishiftResult,
    SolveResult,
    SteihaugResult,
)
from .spectrum import Density, DiagonalEstimate, Eigenpairs, Estimate
from .spectrum.results import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_convergence", "plot_density", "plot_eigenvalues", "plot_eigenvector"]

Solved = SolveResult | MultishiftResult | SteihaugResult | FunctionResult


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
    _expect("plot_density", "density", density, _DENSITY)
    if eigenvalues is not None:
        _expect("plot_density", "eigenvalues", eigenvalues, _EIGENPAIRS)
    ax = _axes("plot_density", ax)
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
            transform=ax.get_xaxis_transform(), label=f"{counted(len(marks), 'eigenvalue')} found",
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(bottom, 3 * top)
    ax.set_xlim(x[0], x[-1])
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("share of eigenvalues per unit (log scale)")
    steps, count = density.nodes.shape
    ax.set_title(
        f"Density of {counted(density.order, 'eigenvalue')} "
        f"({counted(count, 'probe')}, {counted(steps, 'step')} each)"
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
    _expect("plot_eigenvalues", "eigenpairs", eigenpairs, _EIGENPAIRS)
    ax = _axes("plot_eigenvalues", ax)
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
        f"{counted(len(rank), 'eigenvalue')}: {eigenpairs.status}, "
        f"{counted(eigenpairs.products, 'product')}\n"
        f"largest residual {errors.max().item():.1e}"
    )
    return ax


def plot_convergence(
    result: Eigenpairs | Estimate | DiagonalEstimate | Solved, *, ax: Axes | None = None
) -> Axes:
    """How the error went down: against products for a spectrum, against steps for a solver.

    Parameters
    ----------
    result
        Anything from `hvpop.spectrum` but a density, or a result of `hvpop.solvers`.
    ax : matplotlib Axes, optional
        Where to draw; a new figure if not given. Returned.
    """
    _expect("plot_convergence", "result", result, _CONVERGING)
    ax = _axes("plot_convergence", ax)
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
    _expect("plot_eigenvector", "eigenpairs", eigenpairs, _EIGENPAIRS)
    _expect("plot_eigenvector", "layout", layout, _LAYOUT)
    _expect("plot_eigenvector", "index", index, _INDEX)
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
    ax = _axes("plot_eigenvector", ax, 1.6 + 0.28 * len(rows))
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
    known = [entry for entry in result.history if entry[1] < math.inf]
    counts, worst = [entry[0] for entry in known], [entry[1] for entry in known]
    if any(value > 0 for value in worst):
        ax.semilogy(counts, worst, ".-", color="C0", label="search")
        if counts[-1] < result.products:  # what leaves no entry in the history
            checks = "check for missed pairs"
            checks += "" if result.data_errors is None else ", data errors"
            ax.axvspan(counts[-1], result.products, color="0.92", linewidth=0, label=checks)
            ax.legend(frameon=False)
        ax.set_xlim(0, 1.03 * result.products)
        _tidy(ax)
    else:
        _say(ax, "every residual is 0" if known else "no residual: too few products")
    ax.set_xlabel("products")
    ax.set_ylabel("largest residual |A v - lambda v| (log scale)")
    pairs = counted(result.eigenvalues.shape[0], "eigenpair")
    ax.set_title(f"{pairs}: {result.status} after {counted(result.products, 'product')}")


def _draw_estimate(ax: Axes, result: Estimate) -> None:
    known = [entry for entry in result.history if entry[2] < math.inf]
    counts, halves = [entry[0] for entry in known], [entry[2] for entry in known]
    sign = -1.0 if result.value < 0 else 1.0
    values = [sign * entry[1] for entry in known]
    ax.axhline(result.value, color="0.6", linewidth=0.8)
    if len(known) < 2:  # a band would have no width
        halves = halves or [math.nan]
        ax.errorbar(
            counts or [result.products], values or [result.value], yerr=halves, fmt="o",
            color="C0", capsize=4, label="estimate, 95 % interval" if known else "estimate",
        )  # fmt: skip
        ax.set_xlim(0, 1.03 * result.products)
    else:
        low = [value - half for value, half in zip(values, halves, strict=True)]
        high = [value + half for value, half in zip(values, halves, strict=True)]
        ax.fill_between(counts, low, high, color="C0", alpha=0.25, linewidth=0, label="95 % band")
        ax.plot(counts, values, ".-", color="C0", label="estimate")
    ax.set_xlabel("products")
    ax.set_ylabel("estimate")
    half = (result.high - result.low) / 2
    price = counted(result.products, "product")
    ax.set_title(f"{result.value:.5g} ± {half:.1g}: {result.status}, {price}")
    ax.legend(frameon=False)


def _draw_diagonal(ax: Axes, result: DiagonalEstimate) -> None:
    known = [entry for entry in result.history if entry[1] > 0 and entry[2] < math.inf]
    if known:
        parts = [error / norm for _, norm, error in known]
        ax.plot([entry[0] for entry in known], parts, ".-")
        ax.set_ylim(bottom=0.0)
        if max(parts) > 0.01:
            ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g} %")
        else:  # percents would make long ticks, which push the label out of the figure
            ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    else:
        _say(ax, "the estimate is 0, or has no error")
    ax.set_xlabel("products")
    ax.set_ylabel("95 % half-widths / diagonal's norm")
    n, price = result.value.shape[0], counted(result.products, "product")
    ax.set_title(f"Diagonal of {n} entries: {result.status}, {price}")


def _draw_solve(ax: Axes, result: Solved) -> None:
    steps, *systems = result.history.shape
    history = result.history.reshape(steps, math.prod(systems)).cpu().double()
    quantity = _quantity(result)
    if bool((history > 0).any()):
        for label, color, columns in _groups(result, history.shape[1]):
            for i in columns:
                ax.semilogy(
                    range(steps), _numbers(history[:, i]), "." if steps == 1 else "-", linewidth=1,
                    color=color, alpha=0.6 if columns[1:] else 1.0,
                    label=label if i == columns[0] else None,
                )  # fmt: skip
        if not isinstance(result, SteihaugResult):
            for i, target in enumerate(sorted({t for t in _numbers(result.targets) if t > 0})):
                label = None if i else "target"
                ax.axhline(target, color="0.5", linewidth=0.8, linestyle=":", label=label)
        ax.legend(frameon=False)
        _tidy(ax)
    else:
        _say(ax, f"every {quantity} is 0" if bool((history == 0).all()) else f"no {quantity}")
    ax.set_xlabel("checks" if isinstance(result, FunctionResult) else "steps")
    ax.set_ylabel(f"{quantity} (log scale)")
    ends = ", ".join(sorted(_words(result.status))) or "nothing to do"
    price = counted(result.products, "product")
    ax.set_title(f"{_subject(result, history.shape[1])}: {ends}, {price}")


_Group = tuple[str | None, Any, Sequence[int]]  # label, colour, columns of the history
_MOST_LABELS = 8


def _groups(result: Solved, count: int) -> Iterator[_Group]:
    """What gets one colour: all systems, or those of one shift."""
    if not isinstance(result, MultishiftResult):
        yield _quantity(result), "C0", range(count)
        return
    import matplotlib as mpl

    shifts = _numbers(result.shifts)
    k, last = count // len(shifts), len(shifts) - 1
    for rank, i in enumerate(sorted(range(len(shifts)), key=shifts.__getitem__)):
        label = f"shift {shifts[i]:.3g}" if last < _MOST_LABELS or rank in (0, last) else None
        color = mpl.colormaps["viridis"](0.9 * rank / max(1, last))
        yield label, color, range(i * k, (i + 1) * k)


def _quantity(result: Solved) -> str:
    """What its history is of."""
    if isinstance(result, FunctionResult):
        return "error estimate"
    return "gradient norm" if isinstance(result, LeastSquaresResult) else "residual norm"


def _subject(result: Solved, count: int) -> str:
    if isinstance(result, SteihaugResult):
        return f"{counted(result.steps, 'step')} in a trust region"
    if isinstance(result, MultishiftResult):
        shifts = counted(len(result.shifts), "shift")
        columns = count // len(result.shifts)
        return shifts if columns == 1 else f"{shifts} of {counted(columns, 'system')}"
    return counted(count, "column" if isinstance(result, FunctionResult) else "system")


def _tidy(ax: Axes) -> None:
    """Ticks that can be read: whole numbers of steps, and a decade at least on the log axis."""
    ax.locator_params(axis="x", integer=True)
    low, high = ax.get_ylim()
    if high < 10 * low:
        ax.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))


def _say(ax: Axes, text: str) -> None:
    """Words where there is nothing to draw."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])


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


_Kind = tuple[Any, str, str]  # a type, its name, the function that draws it

_DENSITY: _Kind = (Density, "a Density from hvpop.spectrum.spectral_density", "plot_density")
_EIGENPAIRS: _Kind = (Eigenpairs, "Eigenpairs from hvpop.spectrum.eigsh", "plot_eigenvalues")
_CONVERGING: _Kind = (
    Eigenpairs | Estimate | DiagonalEstimate | Solved,
    "what hvpop.spectrum (but spectral_density) or hvpop.solvers returns",
    "plot_convergence",
)
_LAYOUT: _Kind = (Layout, "a Layout, such as a HessianOperator's `layout`", "")
_INDEX: _Kind = (SupportsIndex, "an integer", "")


def _expect(who: str, name: str, value: object, kind: _Kind) -> None:
    """Refuse what ``who`` cannot draw, and say which function can."""
    wanted, expected, _ = kind
    if isinstance(value, wanted):
        return
    drawn = [f for T, _, f in (_DENSITY, _EIGENPAIRS, _CONVERGING) if isinstance(value, T)]
    instead = f"; {drawn[0]} draws that" if drawn and drawn[0] != who else ""
    raise TypeError(f"{who} expects {name} to be {expected}, got {type(value).__name__}{instead}")


def _axes(who: str, ax: Axes | None, height: float = 4.0) -> Axes:
    try:
        import matplotlib.axes
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hvpop[plot]'") from error
    if ax is None:
        ax = plt.subplots(figsize=(6.4, height), layout="constrained")[1]
    if not isinstance(ax, matplotlib.axes.Axes):
        raise TypeError(
            f"{who} expects ax to be one matplotlib Axes, such as plt.subplots()[1], got "
            f"{type(ax).__name__}; leave it out for a new figure"
        )
    return ax


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.detach().cpu().tolist()]
