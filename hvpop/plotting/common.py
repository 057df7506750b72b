"""What all pictures share: checked arguments, axes, and numbers that matplotlib takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import Tensor

from ..operators import Layout
from ..solvers import FunctionResult, MultishiftResult, SolveResult, SteihaugResult
from ..spectrum import Density, DiagonalEstimate, Eigenpairs, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Solved = SolveResult | MultishiftResult | SteihaugResult | FunctionResult

_Kind = tuple[Any, str, str]  # a type, its name, the function that draws it

DENSITY: _Kind = (Density, "a Density from hvpop.spectrum.spectral_density", "plot_density")
EIGENPAIRS: _Kind = (Eigenpairs, "Eigenpairs from hvpop.spectrum.eigsh", "plot_eigenvalues")
CONVERGING: _Kind = (
    Eigenpairs | Estimate | DiagonalEstimate | Solved,
    "what hvpop.spectrum (but spectral_density) or hvpop.solvers returns",
    "plot_convergence",
)
LAYOUT: _Kind = (Layout, "a Layout, such as a HessianOperator's `layout`", "")
INDEX: _Kind = (SupportsIndex, "an integer", "")


def expect(who: str, name: str, value: object, kind: _Kind) -> None:
    """Refuse what ``who`` cannot draw, and say which function can."""
    wanted, expected, _ = kind
    if isinstance(value, wanted):
        return
    drawn = [f for T, _, f in (DENSITY, EIGENPAIRS, CONVERGING) if isinstance(value, T)]
    instead = f"; {drawn[0]} draws that" if drawn and drawn[0] != who else ""
    raise TypeError(f"{who} expects {name} to be {expected}, got {type(value).__name__}{instead}")


def axes(who: str, ax: Axes | None, height: float = 4.0) -> Axes:
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


def numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.detach().cpu().tolist()]


def say(ax: Axes, text: str) -> None:
    """Words where there is nothing to draw."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])
