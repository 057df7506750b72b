"""An analysis as one HTML file: no scripts, nothing loaded, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..curvature.cost import in_bytes, in_time
from .analysis import PARTS, Analysis
from .charts import Chart, density_chart
from .ranks import ranks


def render(analysis: Analysis, *, command: str = "") -> str:
    """The page of an analysis: text to be written to a file.

    Parameters
    ----------
    analysis : Analysis
        From `analyze`.
    command : str
        What makes the page again, to be shown.

    Returns
    -------
    str
        HTML. Each number is an element ``<data value=... data-of=...>`` with the value to all its digits
        and its place in ``analysis.as_dict()``.

    Raises
    ------
    ImportError
        Without the extra ``cli``, whose template library it needs.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.report import analyze, render
    >>> found = analyze(Diagonal(torch.arange(1.0, 31.0).double()), k=1, parts=["eigenvalues"])
    >>> page = render(found)
    >>> page.startswith("<!doctype html>"), "<script" in page
    (True, False)
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'hvpop[cli]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"digits": _digits, "time": in_time, "bytes": in_bytes}
    return environment.get_template("page.html").render(
        a=analysis,
        d=analysis.as_dict(),
        charts=_charts(analysis),
        cards=_cards(analysis),
        parts=[part for part in PARTS if part in analysis.seconds],
        command=command,
        ranks=ranks,
    )


def _digits(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}".replace("-", "−")


def _charts(analysis: Analysis) -> list[Chart]:
    if analysis.density is None:
        return []
    marks = [] if analysis.eigenvalues is None else analysis.eigenvalues.eigenvalues.tolist()
    return [density_chart(analysis.density, marks, log=log) for log in (True, False)]


def _cards(analysis: Analysis) -> list[dict[str, Any]]:
    """The numbers that come first: what, where in the data, its value, what is said below."""
    cards: list[dict[str, Any]] = []

    def card(title: str, of: str, value: float, below: str) -> None:
        cards.append({"title": title, "of": of, "value": value, "below": below})

    pairs = analysis.eigenvalues
    if pairs is not None and pairs.eigenvalues.numel():
        last = pairs.eigenvalues.shape[0] - 1
        for title, i in (("largest eigenvalue", last), ("smallest eigenvalue", 0)):
            if analysis.which == "BE" or (analysis.which, i) in (("LA", last), ("SA", 0)):
                below = f"residual {_digits(pairs.residuals[i].item(), 2)}"
                card(title, f"eigenvalues.eigenvalues.{i}", pairs.eigenvalues[i].item(), below)
    for title, of, estimate in (
        ("trace", "trace.value", analysis.trace),
        ("Frobenius norm", "norm.value", analysis.norm),
    ):
        if estimate is not None:
            interval = f"95 % in {_digits(estimate.low)} to {_digits(estimate.high)}"
            card(title, of, estimate.value, interval)
    if analysis.condition is not None:
        card("condition", "condition", analysis.condition, "largest over smallest eigenvalue")
    return cards
