"""Curves as SVG paths: what a template needs to draw a density on a linear or a logarithmic scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from ..spectrum import Density

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 40


@dataclass(frozen=True)
class Chart:
    """Paths in units of the picture, ticks with their labels."""

    title: str
    curve: str
    band: str
    marks: list[float]  # x of each eigenvalue
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: float | None  # x of the eigenvalue zero, if it is in the picture
    words: str  # what a screen reader says
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def density_chart(density: Density, marks: Sequence[float], *, log: bool) -> Chart:
    """The density with its band, and the eigenvalues that are known."""
    x = density.grid.tolist()
    value, low, high = (t.tolist() for t in (density.value, density.low, density.high))
    left, right = min([x[0], *marks]), max([x[-1], *marks])
    single = 1 / (density.order * density.width * (2 * 3.141592653589793) ** 0.5)
    top = float(max(value))
    floor_ = min(single / 5, top / 10) if log else 0.0
    ceiling = 2 * top if log else 1.08 * top

    def across(v: float) -> float:
        return float(LEFT + (v - left) / ((right - left) or 1.0) * (WIDTH - LEFT - RIGHT))

    def up(v: float) -> float:
        v = float(min(max(v, floor_), ceiling))
        share = log10(v / floor_) / log10(ceiling / floor_) if log else v / ceiling
        return float(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM))

    line, there, back = (
        [f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x, heights, strict=True)]
        for heights in (value, high, low)
    )
    heights = decades(floor_, ceiling) if log else steps(0.0, ceiling)
    scale = "logarithmic" if log else "linear"
    return Chart(
        title=f"{scale} scale",
        curve="M" + "L".join(line),
        band="M" + "L".join(there) + "L" + "L".join(reversed(back)) + "Z",
        marks=[round(across(mark), 1) for mark in marks],
        x_ticks=[(round(across(v), 1), text(v)) for v in steps(left, right, 6)],
        y_ticks=[(round(up(v), 1), text(v)) for v in heights],
        zero=round(across(0.0), 1) if left < 0.0 < right else None,
        words=f"Density of the eigenvalues from {left:.3g} to {right:.3g} on a {scale} scale",
    )


def steps(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two others, at most so many and one."""
    span = (high - low) / most
    if span <= 0:
        return [low]
    unit = 10.0 ** floor(log10(span))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= span)
    return [step * i for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, every second or third if there are many."""
    exponents = range(ceil(log10(low)), floor(log10(high)) + 1)
    stride = max(1, ceil(len(exponents) / 6))
    return [10.0**e for e in exponents[::stride]]


def text(value: float) -> str:
    return f"{value:.4g}".replace("-", "−").replace("e+0", "e").replace("e−0", "e−")
