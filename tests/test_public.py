"""The public names and their signatures; ``python -m tests.test_public`` writes tests/public.txt.

A change of that file is a decision: additions are free, anything else breaks users (CHANGELOG.md).
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest

import hvpop

from .test_api_page import PACKAGES, names

FILE = Path(__file__).with_name("public.txt")


def signature(thing: Any) -> str:
    """As it is written, without annotations: those are mypy's to hold."""
    try:
        given = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    text = str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def public() -> Iterator[str]:
    """A line for each name, and for each public method of a class."""
    for package in PACKAGES:
        for name in names(package):
            thing = getattr(package, name)
            full = f"{package.__name__}.{name}"
            alias = (
                get_origin(thing) is not None
            )  # of a type; Python 3.12 gives it a signature, 3.11 does not
            yield f"{full}{signature(thing) if callable(thing) and not alias else ''}"
            if (
                package is hvpop
                and inspect.isclass(thing)
                and issubclass(thing, hvpop.LinearOperator)
            ):
                for method, function in inspect.getmembers(thing, inspect.isfunction):
                    if not method.startswith("_") and function.__module__.startswith("hvpop."):
                        yield f"{full}.{method}{signature(function)}"


def test_public_names_and_signatures_are_those_that_were_decided() -> None:
    decided, found = FILE.read_text(encoding="utf-8").splitlines(), list(public())
    gone = [line for line in decided if line not in found]
    new = [line for line in found if line not in decided]
    assert gone == [], "names or signatures changed; if so decided: python -m tests.test_public"
    assert new == [], "names to be decided on: python -m tests.test_public"


@pytest.mark.parametrize(
    "line", ["hvpop.layerwise(H, *, rtol=0.05, max_products=128, seed=0, progress=False)"]
)
def test_the_list_reads_as_written(line: str) -> None:
    assert line in list(public())


def test_importing_hvpop_imports_no_extra() -> None:
    code = "import sys, hvpop; print(*sys.modules)"
    run = [sys.executable, "-c", code]
    loaded = set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    extras = {"typer", "jinja2", "transformers", "lightning", "matplotlib", "sklearn", "rich"}
    assert extras & loaded == set()


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("hvpop.cli.main()", "typer", "cli"),
        ("hvpop.report.render(hvpop.report.analyze(hvpop.Identity(3), parts=[]))", "jinja2", "cli"),
        ("import hvpop.integrations.hugging_face", "transformers", "hf"),
        ("import hvpop.integrations.lightning", "lightning", "lightning"),
    ],
)
def test_a_missing_extra_is_named(module: str, missing: str, extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import hvpop, hvpop.cli, hvpop.report; {module}"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert f"pip install 'hvpop[{extra}]'" in found.stderr


if __name__ == "__main__":
    FILE.write_text("\n".join(public()) + "\n", encoding="utf-8")
