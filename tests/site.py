"""The links of a built site: every page, picture and anchor that a page points to is there.

``python -m tests.site docs/_build/html``
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page points to, and what can be pointed to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := given.get(key))}
        for key in ("href", "src"):
            if value := given.get(key):
                self.targets.append(value)


def dead(folder: Path) -> list[str]:
    """``page: target`` for each link inside the site that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
    assert pages, f"there is no page in {folder}"
    found = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            missing = not there.exists()
            lost = anchor and there in pages and anchor not in pages[there].anchors
            if missing or lost:
                found.append(f"{path.relative_to(folder.resolve())}: {target}")
    return found


if __name__ == "__main__":
    lost = dead(Path(sys.argv[1]))
    print("\n".join(lost) if lost else "no dead link")
    raise SystemExit(bool(lost))
