"""The tables of docs/models.md: what the zoo holds, what it refuses, what is rewritten.

``python -m tests.zoo.table`` writes them; a test tells when they are stale.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from hvpop.risk import rewrites

from .registry import CASES, Case

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
EXAMPLES = 6  # of each family

Rows = list[tuple[str, ...]]


def load() -> dict[str, str]:
    """Register every case; return what each family holds, in the words of its file."""
    holds: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        try:
            module = importlib.import_module(f".{path.stem}", __package__)
        except pytest.skip.Exception:  # the optional packages of a family are not here
            continue
        first = (module.__doc__ or "").partition("\n")[0]
        holds[path.stem.removeprefix("cases_")] = first.removeprefix("Cases: ").rstrip(".")
    return holds


def families() -> Rows:
    """Each family with its number of cases, what it holds, and examples."""
    rows: Rows = [("family", "cases", "what it holds", "for example")]
    total = 0
    for family, words in load().items():
        cases = [case for case in CASES.values() if case.family == family]
        step = max(len(cases) / EXAMPLES, 1)
        shown = [cases[int(i * step)] for i in range(min(EXAMPLES, len(cases)))]
        total += len(cases)
        rows.append((family, str(len(cases)), words, _listed(shown)))
    return [*rows, ("all", str(total), "", "")]


def conventions() -> Rows:
    """The cases that follow double backward, where differences of gradients give another matrix."""
    load()
    rows: Rows = [("family", "cases that follow a convention")]
    found: dict[str, list[Case]] = {}
    for case in CASES.values():
        if case.reference == "double backward" or not case.symmetric:
            found.setdefault(case.family, []).append(case)
    return rows + [(family, _listed(found[family])) for family in sorted(found)]


def refused() -> Rows:
    """Each refused case and what it is told."""
    load()
    rows: Rows = [("refused", "with the message")]
    return rows + [
        (f"`{case.name}`", _message(case)) for case in CASES.values() if case.refused is not None
    ]


def rewritten() -> Rows:
    """Each op of the table of rewrites, with the remark beside it in the source."""
    rows: Rows = [("op", "derivatives of torch that are missing or wrong")]
    source = inspect.getsource(rewrites)
    table = source[source.index("\nREWRITES") :]
    found = re.findall(r"^    ([\w.]+): [\w.]+,(?:  # (.*))?$", table, re.MULTILINE)
    for name, remark in found:
        name = name.replace("_torch.", "F.")  # where not every torch has it
        if remark:
            rows.append((f"`{name}`", remark))
        else:  # another spelling of the op above
            names, words = rows.pop()
            rows.append((f"{names}, `{name}`", words))
    return rows


TABLES: dict[str, Callable[[], Rows]] = {
    "zoo": families,
    "conventions": conventions,
    "refused": refused,
    "rewrites": rewritten,
}
"""Marker in the page -> what stands there."""


def written(page: str, names: Iterable[str] = tuple(TABLES)) -> str:
    """Return the page with its tables made anew."""
    for name in names:
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page needs {begin.strip()} and {end}, each once")
        head, _, rest = page.partition(begin)
        page = head + begin + _markdown(TABLES[name]()) + end + rest.partition(end)[2]
    return page


def _markdown(rows: Rows) -> str:
    header, *body = rows
    lines = [header, ("---",) * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _message(case: Case) -> str:
    from .test_zoo import built, count, operator

    problem = built(case)
    try:
        operator(case, problem).matvec(torch.ones(count(problem), dtype=torch.float64))
    except Exception as error:
        return str(error).partition("\n")[0].replace("|", "\\|").replace("<", "&lt;")
    raise AssertionError(f"{case.name} is not refused")


def _listed(cases: list[Case]) -> str:
    return ", ".join(f"`{case.name}`" for case in cases)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
