"""What a check found, and how that reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "open", "wrong"]
"""``"open"``: it was looked at and tells nothing."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    detail: str


@dataclass(frozen=True)
class Timing:
    """What one product costs with one strategy."""

    strategy: str
    seconds: float
    graph_bytes: int | None  # None: not known
    error: float  # relative, against finite differences of backward() gradients


@dataclass(frozen=True)
class CheckResult:
    """What `HessianOperator.check` found; prints as a report."""

    findings: tuple[Finding, ...]
    timings: tuple[Timing, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong and nothing is left open; notes do not count."""
        return all(finding.level not in ("wrong", "open") for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line."""
        wrong = [finding.what for finding in self.findings if finding.level == "wrong"]
        if wrong:
            return "do not trust this operator yet: " + ", ".join(wrong)
        undecided = [finding.what for finding in self.findings if finding.level == "open"]
        if undecided:
            return "undecided, nothing wrong was found: " + ", ".join(undecided)
        notes = sum(finding.level == "note" for finding in self.findings)
        return "healthy" + (f", {notes} notes" if notes > 1 else ", one note" if notes else "")

    def __str__(self) -> str:
        signs = {"ok": "  ok  ", "note": " note ", "open": " open ", "wrong": "WRONG "}
        lines = [f"{signs[f.level]} {f.what}: {f.detail}" for f in self.findings]
        lines += [
            f"       {t.strategy}: {t.seconds * 1e3:.3g} ms a product, "
            f"{_size(t.graph_bytes)}, error {t.error:.1e}"
            for t in self.timings
        ]
        return "\n".join([*lines, f"verdict: {self.verdict}"])


def _size(graph_bytes: int | None) -> str:
    return (
        "graph of unknown size"
        if graph_bytes is None
        else f"{graph_bytes / 2**20:.2f} MiB of graph"
    )
