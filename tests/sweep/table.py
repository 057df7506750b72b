"""The table of docs/models.md that says what became of torch's own ops and layers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

WORDS = {
    "right": "right",
    "rewritten": "right, by a formula of the table above",
    "differences": "right, by finite differences, with a warning",
    "refused": "refused, although the second derivative exists",
    "first gradient": "torch's own first gradient is not the derivative of its value",
    "singular": "at a kink, a tie or a singular point, where differences tell nothing",
    "wrong": "wrong",
    "crashed": "the process ended",
}
"""Verdict -> what the table calls it, in its order."""

NAMED = ("rewritten", "differences", "refused", "first gradient", "wrong", "crashed")


def write(output: Path) -> None:
    """Put the table of a sweep into the page."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    begin, end = "<!-- sweep: begin -->\n", "<!-- sweep: end -->"
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    PAGE.write_text(head + begin + table(lines) + end + rest.partition(end)[2], encoding="utf-8")


def table(lines: Iterable[dict[str, Any]]) -> str:
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(kind(line), []).append(line["name"])
    rows = ["| cases | verdict | of |\n", "| --- | --- | --- |\n"]
    for verdict, words in WORDS.items():
        names = found.get(verdict, [])
        shown = [f"`{name}`" for name in sorted(set(names))] if verdict in NAMED else []
        rows.append(f"| {len(names)} | {words} | {', '.join(shown)} |\n")
    return "".join(rows)


def kind(line: dict[str, Any]) -> str:
    verdict = str(line["verdict"])
    if verdict.startswith(("unknown", "kink")):
        return "singular"
    return "rewritten" if verdict == "right" and line["rewritten"] else verdict
