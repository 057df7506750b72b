"""Links of the Markdown pages lead somewhere: to files that exist and headings that are in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .site import dead

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if not {"_build", "gallery"} & set(p.parts)),
]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower().strip()).replace(" ", "-") for t in titles}


def lost(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        made = there == ROOT / "docs" / "gallery" / "index.md"  # by `make docs`
        if made or there.is_dir():
            continue
        if not there.exists() or (anchor and anchor not in headings(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert lost(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# A b\n[x](#a-b) [y](#c) [z](b.md)\n```\n[q](r.md)\n```\n", "utf-8"
    )
    assert lost(tmp_path / "a.md") == ["#c", "b.md"]
    (tmp_path / "a.html").write_text(
        '<p id="p"><a href="#p"></a><a href="#q"></a><img src="x.png">', "utf-8"
    )
    assert dead(tmp_path) == ["a.html: #q", "a.html: x.png"]
