"""What was measured, as tables, as JSON and as pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import large
import torch
from contests import Row
from scaling import Curve

PACKAGES = (
    "hvpop", "torch", "numpy", "scipy", "pyDVL", "curvlinops-for-pytorch", "hessian-eigenthings",
    "PyHessian",
)  # fmt: skip


def table(title: str, rows: Sequence[Row]) -> str:
    """One question: fastest first; ratios are to the full gradient, measured in the same rounds."""
    first = rows[0]
    unit = f"gradient {first.unit.median * 1e3:.2f} ms" if first.unit else ""
    best = fastest(rows, ours=False)
    lines = [
        "",
        f"{first.workload} ({title}): {first.question}   [{unit}]",
        f"  {'':36} {'gradients':>9} {'min':>7} {'limit':>6} {'vs peer':>8} {'ms':>9} {'setup s':>8} "
        f"{'error':>8}",
    ]
    timed = sorted((r for r in rows if r.seconds), key=lambda r: r.seconds.median)
    for row in timed:
        relative = row.seconds.in_units_of(best.seconds) if best and best.seconds else None
        lines.append(
            f"{'>' if row.ours else ' '} {row.entrant:36} {_number(row.ratio):>9} "
            f"{_number(row.least_ratio):>7} {_number(row.limit):>6} {_number(relative):>8} "
            f"{row.seconds.median * 1e3:9.2f} {_number(row.setup):>8} {row.error:8.1e}"
            f"{'' if row.right else '  ' + row.status.upper()}"
        )
    lines += [f"  {row.entrant:36} {row.status}" for row in rows if not row.seconds]
    return "\n".join(lines)


def fastest(rows: Sequence[Row], *, ours: bool) -> Row | None:
    """The fastest right answer, hvpop's or a peer's; code by hand is no peer."""
    candidates = [
        r for r in rows if r.right and r.seconds and r.ours == ours and "by hand" not in r.entrant
    ]
    return min(candidates, key=lambda r: r.seconds.median, default=None)


# -- what was promised -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The most that one of hvpop's ways may take, relative to the fastest correct peer."""

    question: str  # its beginning
    entrant: str
    most: dict[str, float]  # by workload
    keeping: bool = True  # whether peers that keep graphs are among those compared with


SMALL = ("tiny", "mlp", "cnn", "gpt")
TARGETS = (
    Target("one product", "hvpop, linearized", dict.fromkeys(SMALL, 1.0)),
    Target("one product", "hvpop, Compiled without compiler", {"cnn": 0.85, "gpt": 0.9}),
    Target("one product", "hvpop, Compiled", {"tiny": 0.75, "gpt": 0.75}),
    Target("one product", "hvpop", {"tiny": 1.15, "mlp": 1.05, "cnn": 1.05, "gpt": 1.05}, False),
    Target("a column", "best", {"tiny": 0.35, "mlp": 1.0, "cnn": 1.0, "gpt": 1.0}),
    Target("10 eigenvalues by SciPy", "best", {"digits": 0.4}),
    Target("one product, keeping", "best", {"memory": 0.8}),
    Target("10 eigenvalues, residuals", "best", {"digits": 0.5}),
    Target("trace", "best", {"digits": 0.5}),
    Target("density", "best", {"digits": 0.5}),
    Target("16 solves", "best", {"digits": 0.5}),
    Target("16 systems, one operator", "best", {"digits": 0.35}),
    *(Target(question, "best", {large.NAME: most}) for question, most in large.AIMS.items()),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a target on one workload."""

    workload: str
    question: str
    entrant: str
    peer: str
    ratio: float
    most: float


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Each target with what was measured, in the same rounds as the peer."""
    found = []
    for target in TARGETS:
        for workload, most in target.most.items():
            asked = [
                r for r in rows if r.workload == workload and r.question.startswith(target.question)
            ]
            peers = [r for r in asked if target.keeping or not r.keeps]
            peer = fastest(peers, ours=False)
            mine = fastest([r for r in asked if target.entrant in ("best", r.entrant)], ours=True)
            if mine is None or peer is None:
                continue
            ratio = mine.seconds.in_units_of(peer.seconds)
            found.append(Outcome(workload, mine.question, mine.entrant, peer.entrant, ratio, most))
    return found


def targets(rows: Sequence[Row]) -> str:
    """The outcomes as text."""
    lines = ["", "relative to the fastest correct peer (by hand not counted); lower is better"]
    lines += [
        f"  {'ok ' if o.ratio <= o.most else 'NOT'} {o.workload:7} {o.question:40.40} "
        f"{o.entrant:34} {o.ratio:5.2f} of at most {o.most:.2f}   ({o.peer})"
        for o in outcomes(rows)
    ]
    return "\n".join(lines)


# -- files -----------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[list[Row], list[Curve]]:
    """What `save` left in a folder; nothing if it left nothing."""
    file = folder / "benchmarks.json"
    if not file.exists():
        return [], []
    record = json.loads(file.read_text(encoding="utf-8"))
    return [Row.restored(row) for row in record["rows"]], [Curve(**c) for c in record["scaling"]]


def save(rows: Sequence[Row], curves: Sequence[Curve], folder: Path) -> None:
    """``benchmarks.json``, ``benchmarks.png`` and ``scaling.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": _machine(),
        "versions": _versions(),
        "rows": [row.record() for row in rows],
        "targets": [asdict(outcome) for outcome in outcomes(rows)],
        "scaling": [asdict(curve) for curve in curves],
    }
    (folder / "benchmarks.json").write_text(json.dumps(record, indent=1))
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("agg")
    _bars(rows, folder / "benchmarks.png")
    if curves:
        _scaling(curves, folder / "scaling.png")


def _bars(rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.question), []).append(row)
    columns = min(3, len(groups))
    height = -(-len(groups) // columns)
    fig, axes = plt.subplots(
        height, columns, figsize=(6.2 * columns, 3.6 * height), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax, ((workload, question), group) in zip(axes.flat, groups.items(), strict=False):
        shown = sorted((r for r in group if r.ratio), key=lambda r: -r.ratio)
        names = [r.entrant + ("" if r.right else "  (wrong)") for r in shown]
        colors = ["tab:blue" if r.ours else "0.6" if r.right else "tab:red" for r in shown]
        ax.barh(names, [r.ratio for r in shown], color=colors, log=True)
        for y, row in enumerate(shown):
            text = f"{row.ratio:.3g}" if row.ratio < 1000 else f"{row.ratio:.0f}"
            ax.text(row.ratio, y, f" {text}", va="center", fontsize=8)
        ax.margins(x=0.15)
        _ticks(ax.xaxis)
        for limit, style in _limits(shown):
            ax.axvline(limit, color="k", linewidth=1, linestyle=style)
        absent = [f"{r.entrant}: {r.status.partition(':')[0]}" for r in group if not r.ratio]
        ax.set_title(f"{workload}: {question}", fontsize=10)
        ax.set_xlabel("full gradients" + "".join(f"\n{a}" for a in absent), fontsize=8)
        ax.tick_params(labelsize=8)
    fig.suptitle(
        "cost in full gradients, lower is better; lines: the arithmetic of a product "
        "(dashed: what does not depend on v is kept; dotted: nothing is kept)",
        fontsize=11,
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _limits(rows: Sequence[Row]) -> set[tuple[float, str]]:
    return {(r.limit, "--" if r.keeps else ":") for r in rows if r.limit is not None}


def _scaling(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib.pyplot as plt

    axes_names = list(dict.fromkeys(c.axis for c in curves))
    fig, axes = plt.subplots(
        1, len(axes_names), figsize=(5.5 * len(axes_names), 4), squeeze=False, layout="constrained"
    )
    for ax, axis in zip(axes.flat, axes_names, strict=True):
        chosen = [c for c in curves if c.axis == axis]
        for curve in chosen:
            ax.loglog(curve.sizes, [1e3 * s for s in curve.seconds], "o-", label=curve.entrant)
        sizes = chosen[-1].sizes
        last = 1e3 * max(c.seconds[-1] for c in chosen)
        ax.loglog(sizes, [last * s / sizes[-1] for s in sizes], "k:", label="linear")
        ax.set_xticks(sizes, [f"{s:,}" if s < 10_000 else f"{s / 1e6:.2f} M" for s in sizes])
        ax.minorticks_off()
        _ticks(ax.yaxis)
        ax.set_xlabel(axis)
        ax.set_ylabel("ms a product")
        ax.legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _ticks(axis: Any) -> None:
    """Numbers on a log axis, also where it spans less than a decade."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
