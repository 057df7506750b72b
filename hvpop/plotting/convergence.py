"""Pictures of how an error went down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..operators.wording import counted
from ..solvers import FunctionResult, LeastSquaresResult, MultishiftResult, SteihaugResult
from ..spectrum import DiagonalEstimate, Eigenpairs, Estimate
from .common import CONVERGING, Solved, axes, expect, numbers, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    expect("plot_convergence", "result", result, CONVERGING)
    ax = axes("plot_convergence", ax)
    if isinstance(result, Eigenpairs):
        _draw_eigenpairs(ax, result)
    elif isinstance(result, Estimate):
        _draw_estimate(ax, result)
    elif isinstance(result, DiagonalEstimate):
        _draw_diagonal(ax, result)
    else:
        _draw_solve(ax, result)
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
        say(ax, "every residual is 0" if known else "no residual: too few products")
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
        say(ax, "the estimate is 0, or has no error")
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
                    range(steps), numbers(history[:, i]), "." if steps == 1 else "-", linewidth=1,
                    color=color, alpha=0.6 if columns[1:] else 1.0,
                    label=label if i == columns[0] else None,
                )  # fmt: skip
        if not isinstance(result, SteihaugResult):
            for i, target in enumerate(sorted({t for t in numbers(result.targets) if t > 0})):
                label = None if i else "target"
                ax.axhline(target, color="0.5", linewidth=0.8, linestyle=":", label=label)
        ax.legend(frameon=False)
        _tidy(ax)
    else:
        say(ax, f"every {quantity} is 0" if bool((history == 0).all()) else f"no {quantity}")
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

    shifts = numbers(result.shifts)
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


def _words(status: object) -> set[str]:
    """The different words in a status, which is one or a nest of tuples of them."""
    if isinstance(status, tuple):
        return set().union(*(_words(part) for part in status))
    return {str(status)}
