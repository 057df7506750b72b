"""Put what was measured into the documentation: ``python tests/benchmarks/page.py output``.

Tables go between the markers ``<!-- measured: NAME -->`` and ``<!-- end -->`` of docs/performance.md,
pictures beside it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

DOCS = Path(__file__).parents[2] / "docs"
SMALL = ("tiny", "mlp", "cnn", "gpt")


def products(question: str) -> Callable[[Record], str]:
    """Who pays how many gradients, workload by workload."""

    def table(record: Record) -> str:
        cells = {
            (row["entrant"], row["workload"]): _ratio(row)
            for row in record["rows"]
            if row["question"].startswith(question) and row["workload"] in SMALL
        }
        limits = {
            workload: next(
                f"{row['limit']:.2f}"
                for row in record["rows"]
                if row["workload"] == workload and row["keeps"] and row["limit"]
            )
            for workload in SMALL
        }
        least = ["*arithmetic, kept*", *(f"*{limits[w]}*" for w in SMALL)]
        rows = [[n, *(cells.get((n, w), "") for w in SMALL)] for n in _names(record, question)]
        return _table(["", *SMALL], [least, *rows])

    return table


def answers(record: Record) -> str:
    """Milliseconds to each answer on the digits."""
    asked = [row for row in record["rows"] if row["workload"] == "digits"]
    questions = list(dict.fromkeys(row["question"] for row in asked))
    names = list(dict.fromkeys(row["entrant"] for row in asked))
    cells = {(row["entrant"], row["question"]): _milliseconds(row) for row in asked}
    rows = [[name, *(cells.get((name, q), "") for q in questions)] for name in names]
    return _table(["", *questions], rows)


def within_memory(record: Record) -> str:
    asked = [row for row in record["rows"] if row["workload"] == "memory"]
    return _table([asked[0]["question"], "gradients"], [[r["entrant"], _ratio(r)] for r in asked])


def targets(record: Record) -> str:
    """hvpop's time in units of the fastest peer's that is right, from the same rounds."""
    rows = [
        [t["workload"], t["question"], t["entrant"], t["peer"], f"{t['ratio']:.2f}", f"{t['most']:.2f}"]
        for t in record["targets"]
    ]  # fmt: skip
    return _table(["workload", "question", "hvpop", "fastest peer", "ratio", "aim"], rows)


def machine(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    where = record["machine"]
    return f"{where['processor']}, {where['threads']} thread; {versions}."


TABLES: dict[str, Callable[[Record], str]] = {
    "one product": products("one product"),
    "sixteen columns": products("a column"),
    "answers": answers,
    "memory": within_memory,
    "targets": targets,
    "machine": machine,
}


def filled(text: str, record: Record) -> str:
    """The page with every table made anew."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](record)}\n{match[3]}"

    return re.sub(r"(<!-- measured: ([a-z ]+) -->).*?(<!-- end -->)", made, text, flags=re.DOTALL)


def _names(record: Record, question: str) -> list[str]:
    """Entrants, hvpop's first, then the peers by their name."""
    asked = [row for row in record["rows"] if row["question"].startswith(question)]
    names = dict.fromkeys(row["entrant"] for row in sorted(asked, key=lambda row: not row["ours"]))
    return list(names)


def _ratio(row: Record) -> str:
    return _marked(row, f"{row['ratio']:.2f}") if row["ratio"] else row["status"].partition(":")[0]


def _milliseconds(row: Record) -> str:
    if not row.get("median"):
        return str(row["status"]).partition(":")[0]
    return _marked(row, f"{1e3 * row['median']:.0f} ms")


def _marked(row: Record, number: str) -> str:
    if row["status"] == "wrong":
        return f"{number} (wrong by {row['error']:.0e})"
    return f"**{number}**" if row["ours"] else number


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(folder: Path) -> None:
    record = json.loads((folder / "benchmarks.json").read_text(encoding="utf-8"))
    page = DOCS / "performance.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), record), encoding="utf-8")
    for name in ("benchmarks.png", "scaling.png"):
        shutil.copy(folder / name, DOCS / "images" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "output"))
