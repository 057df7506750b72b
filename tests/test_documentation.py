"""What the documentation shows is run: examples in docstrings, Python blocks in Markdown pages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import hvpop

ROOT = Path(__file__).parents[1]
MADE = {"_build", "gallery"}  # by `make docs`, which runs the examples
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if not MADE & set(p.parts)),
]
MODULES = ["hvpop", *(m.name for m in pkgutil.walk_packages(hvpop.__path__, "hvpop."))]

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """The Python blocks of a page, each padded so that line numbers are those of the page."""
    return ["\n" * text.count("\n", 0, m.start(1)) + m.group(1) for m in BLOCK.finditer(text)]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples may write files, and need no display."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_the_examples_of_a_module_give_what_they_show(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), verbose=False)
    assert results.failed == 0


@pytest.mark.parametrize("name", hvpop.__all__)
def test_what_hvpop_exports_explains_itself(name: str) -> None:
    assert (getattr(hvpop, name).__doc__ or "").strip()


# torch.optim.LBFGS of 2.8 makes a number of the loss that its user's closure returns.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    assert found, f"{page.name} shows no Python; a page of hvpop's documentation does"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        exec(compile(block, str(page), "exec", dont_inherit=True), namespace)


def test_a_block_that_fails_is_found_at_its_line() -> None:
    (good, bad) = blocks("# Page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nx.missing\n```\n")
    namespace: dict[str, Any] = {}
    exec(compile(good, "page.md", "exec"), namespace)
    with pytest.raises(AttributeError) as failure:
        exec(compile(bad, "page.md", "exec"), namespace)
    assert failure.traceback[-1].lineno == 9
