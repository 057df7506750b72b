"""The tables of docs/versions.md: where the suite has been run, and what the releases differ in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "versions.md"


def write(results: Iterable[Path]) -> None:
    """Put what is known of all environments into the page."""
    found = [json.loads(path.read_text()) for path in results]
    found.sort(key=lambda f: (*map(int, f["torch"].split(".")), f["python"], f["numpy"]))
    page = PAGE.read_text(encoding="utf-8")
    for name, table in (("suite", suite(found)), ("formulas", formulas(found))):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        head, _, rest = page.partition(begin)
        page = head + begin + table + end + rest.partition(end)[2]
    PAGE.write_text(page, encoding="utf-8")


def suite(found: list[dict[str, Any]]) -> str:
    rows = [
        "| torch | Python | NumPy | SciPy | zoo: tests, failed | the rest: tests, failed | refused cases | by differences | skipped |\n",
        "|" + " --- |" * 9 + "\n",
    ]
    for f in found:
        counts = [f"{f[part][0]:,}, {f[part][1]}" for part in ("zoo", "rest")]
        by = ", ".join(f"`{name}`" for name in f["differences"])
        cells = [f["torch"], f["python"], f["numpy"], f["scipy"], *counts, str(len(f["refused"]))]
        rows.append(f"| {' | '.join([*cells, by, '; '.join(f['skipped'])])} |\n")
    return "".join(rows)


def formulas(found: list[dict[str, Any]]) -> str:
    """Which ops need their formulas; one column for each torch."""
    by_torch = {f["torch"]: f["needed"] for f in found}
    rows = [
        f"| op | {' | '.join(by_torch)} |\n",
        "|" + " --- |" * (len(by_torch) + 1) + "\n",
    ]
    for name in dict.fromkeys(name for needed in by_torch.values() for name in needed):
        words = [
            {True: "formula", False: "torch", None: ""}[n.get(name)] for n in by_torch.values()
        ]
        rows.append(f"| `{name}` | {' | '.join(words)} |\n")
    return "".join(rows)
