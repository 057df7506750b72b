"""The public names and their signatures; ``python -m tests.test_public`` writes tests/public.txt.

A change of that file is a decision: additions are free, anything else breaks users (CHANGELOG.md).
"""

from __future__ import annotations

import inspect
import json
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
    code = "import sys, hvpop, hvpop.plotting; print(*sys.modules)"
    run = [sys.executable, "-c", code]
    loaded = set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    extras = {"typer", "jinja2", "transformers", "lightning", "matplotlib", "sklearn", "rich"}
    assert extras & loaded == set()


MISSING = {
    "typer": ("hvpop.cli.main()", "cli"),
    "jinja2": (
        "hvpop.report.render(hvpop.report.analyze(hvpop.Identity(3), parts=[]))",
        "cli",
    ),
    "transformers": ("import hvpop.integrations.hugging_face", "hf"),
    "lightning": ("import hvpop.integrations.lightning", "lightning"),
}

WITHOUT = """
import contextlib, io, json, sys
import hvpop, hvpop.cli, hvpop.report
said = {}
for missing, call in json.loads(sys.argv[1]).items():
    sys.modules[missing] = None
    with contextlib.redirect_stderr(io.StringIO()) as words:
        try:
            exec(call)
        except SystemExit as end:
            said[missing] = f"{words.getvalue()}{end}" if end.code else "it ended well"
        except ImportError as error:
            said[missing] = str(error)
print(json.dumps(said))
"""


def test_a_missing_extra_is_named() -> None:
    calls = json.dumps({missing: call for missing, (call, _) in MISSING.items()})
    run = [sys.executable, "-c", WITHOUT, calls]
    said = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    for missing, (_, extra) in MISSING.items():
        assert f"pip install 'hvpop[{extra}]'" in said[missing], missing


if __name__ == "__main__":
    FILE.write_text("\n".join(public()) + "\n", encoding="utf-8")
