"""docs/api.md names everything that is public; ``python -m tests.test_api_page`` writes it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hvpop
from hvpop import (
    curvature,
    distributed,
    functional,
    integrations,
    plotting,
    report,
    risk,
    solvers,
    spectrum,
    strategies,
    testing,
)

PAGE = Path(__file__).parents[1] / "docs" / "api.md"

HEAD = """\
# All names

A line for each, from its docstring; the docstring has the arguments, shapes, cost, source and an example:

```python
import hvpop
from hvpop import solvers

print(solvers.cg.__doc__)  # or help(solvers.cg), or solvers.cg? in a notebook
print(hvpop.__version__)
```

This page is generated: `python -m tests.test_api_page`.
"""

WITHOUT_DOCSTRING = {
    "BATCHES": "An `Average`: every batch counts alike.",
    "SAMPLES": "An `Average`, the default: batches count by what their mean loss divides by.",
    "TOTAL": "An `Average`: the sum of the batch losses, not divided.",
    "PARTS": "What `analyze` can find out, in the order in which it does.",
    "Params": "A dict of tensors by parameter name: a point, or a direction.",
    "ScalarFunction": "A function of `Params` and data that returns a scalar.",
}

PACKAGES: dict[ModuleType, str] = {
    hvpop: "Operators, strategies, risks: what most programs need.",
    solvers: "[Solving](solvers.md): systems, inverses, functions of an operator.",
    spectrum: "[Spectra](spectrum.md): eigenvalues, and estimates with their error.",
    plotting: "[Pictures](spectrum.md#pictures) of results; needs the extra `plot`.",
    distributed: "[Many processes](distributed.md) of torchrun; a journal for any solver.",
    strategies: "[How to differentiate twice](strategies.md).",
    risk: "[Model, loss and data](concepts.md) as weighted scalar functions.",
    curvature: "What `HessianOperator` returns.",
    functional: "Hessian-vector products as plain functions.",
    report: "An operator examined as a whole; what the [command line](cli.md) shows.",
    integrations: "[In training loops](training.md): for own ones, and for Trainers by `.hugging_face` and `.lightning`.",
    testing: "For tests of operators of your own.",
}


def names(package: ModuleType) -> list[str]:
    """What is public: ``__all__``, or the functions that the module defines."""
    listed = getattr(package, "__all__", None)
    if listed is not None:
        return sorted(listed, key=str.lower)
    functions = inspect.getmembers(package, inspect.isfunction)
    return [n for n, f in functions if f.__module__ == package.__name__ and not n.startswith("_")]


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class explains, beside those of every operator."""
    own = cls.__mro__[: cls.__mro__.index(hvpop.LinearOperator)] or (cls,)
    members = {n: m for base in reversed(own) for n, m in vars(base).items()}
    for name, member in sorted(members.items()) if len(own) > 1 else members.items():
        function = member.fget if isinstance(member, property) else member
        if not name.startswith("_") and inspect.getdoc(function):
            yield name, getattr(function, "__func__", function)


def line(name: str, thing: Any) -> str:
    """The first sentence of the docstring, in one line of a table."""
    if name in WITHOUT_DOCSTRING:
        return WITHOUT_DOCSTRING[name]
    first = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    first = re.split(r"(?<=\.)\s", first.replace("\n", " "))[0]
    return first.replace("``", "`").replace("|", "\\|")


def page() -> str:
    parts = [HEAD]
    for package, about in PACKAGES.items():
        rows = [f"| `{n}` | {line(n, getattr(package, n))} |" for n in names(package)]
        parts.append(_section(f"`{package.__name__}`", about, "name", rows))
    for cls in (hvpop.LinearOperator, hvpop.HessianOperator):
        rows = [f"| `.{n}` | {line(n, f)} |" for n, f in methods(cls)]
        about = "What every operator can do." if cls is hvpop.LinearOperator else "What it adds."
        parts.append(_section(f"Methods of `{cls.__name__}`", about, "method", rows))
    return "\n".join(parts)


def _section(title: str, about: str, kind: str, rows: list[str]) -> str:
    return "\n".join([f"## {title}", "", about, "", f"| {kind} | |", "| --- | --- |", *rows, ""])


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_page_names_everything_public(package: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    section = text.partition(f"## `{package.__name__}`\n")[2].partition("\n## ")[0]
    assert names(package)
    assert [n for n in names(package) if f"| `{n}` |" not in section] == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_a_line(package: ModuleType) -> None:
    assert [n for n in names(package) if len(line(n, getattr(package, n))) < 8] == []


def test_the_page_is_as_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.test_api_page"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
