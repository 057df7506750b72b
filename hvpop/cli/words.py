"""An analysis as text for a terminal."""

from __future__ import annotations

from ..report import Analysis
from ..report.ranks import ranks


def shown(found: Analysis) -> str:
    """What stdout gets: numbers with their errors, and how each ended."""
    lines = [found.operator]
    if found.check is not None:
        lines += ["", f"check: {found.check.verdict}"]
    pairs = found.eigenvalues
    if pairs is not None:
        lines += ["", f"eigenvalues ({found.which}): {pairs.status}, {pairs.products} products"]
        names = ranks(pairs.eigenvalues.tolist(), found.which)
        width = max([4, *map(len, names)])
        head = f"{'':>{width}} {'eigenvalue':>14} {'residual':>10}"
        errors = pairs.data_errors
        lines.append(head + (f" {'data error':>11}" if errors is not None else ""))
        for i in reversed(range(len(names))):
            row = f"{names[i]:>{width}} {pairs.eigenvalues[i].item():>14.6g} {pairs.residuals[i].item():>10.1e}"
            lines.append(row + (f" {errors[i].item():>11.1e}" if errors is not None else ""))
    for name, estimate in (("trace", found.trace), ("Frobenius norm", found.norm)):
        if estimate is not None:
            data = (
                f", data error {estimate.data_error:.1e}" if estimate.data_error is not None else ""
            )
            lines += [
                "",
                f"{name}: {estimate.value:.6g}, 95 % in [{estimate.low:.6g}, {estimate.high:.6g}]{data}",
            ]
            lines.append(f"  {estimate.status}, {estimate.products} products")
    if found.condition is not None:
        lines += ["", f"condition: {found.condition:.4g}"]
    if found.layers is not None:
        lines += ["", str(found.layers)]
    return "\n".join(lines)
