"""The page shows what the analysis holds, and reads well in a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hvpop import Diagonal
from hvpop.report import analyze, render

from .problems import analysis

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Numbers(HTMLParser):
    """Each ``<data>`` element: where it comes from, its value, what is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, float, str]] = []
        self.tags: list[str] = []
        self._open: tuple[str, float] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "data":
            given = dict(attrs)
            self._open = str(given["data-of"]), float(given["value"] or "nan")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found.append((*self._open, data))
            self._open = None


def looked_up(data: Any, of: str) -> Any:
    """``layers.trace.0`` in nested dicts and lists."""
    for key in of.split("."):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def test_every_number_of_the_page_is_that_of_the_analysis() -> None:
    found = Numbers(render(analysis())).found
    data = analysis().as_dict()
    assert len(found) > 30
    for of, value, shown in found:
        assert value == looked_up(data, of), of
        read = shown.replace("−", "-")
        percent = read.endswith(" %")
        number = float(read.removesuffix(" %")) / (100 if percent else 1)
        digits = 5e-4 if percent else 0.05 * abs(value) + 1e-300  # one digit, at the least
        assert abs(number - value) <= digits, of


def test_the_page_holds_all_that_was_found() -> None:
    names = {of.partition(".")[0] for of, _, _ in Numbers(render(analysis())).found}
    parts = {"eigenvalues", "trace", "norm", "spectral_norm", "density", "layers", "products"}
    assert names == parts


def test_it_is_one_small_file_without_scripts_that_loads_nothing() -> None:
    page = render(analysis(), command="hvpop report 'a b.py:make' <again>")
    tags = Numbers(page).tags
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    assert "http" not in page
    assert "url(" not in page
    assert len(page.encode()) < 2_000_000
    assert "prefers-color-scheme: dark" in page
    assert "hvpop report &#39;a b.py:make&#39; &lt;again&gt;" in page


def test_what_was_not_asked_for_or_not_reached_leaves_a_page() -> None:
    page = render(analyze(Diagonal(analysis().eigenvalues.eigenvalues), k=1, parts=["trace"]))
    assert "Eigenvalues</h2>" not in page
    assert "Trace and norms" in page


MEASURE = """<!doctype html><body><iframe id="f" src="page.html" width="{width}" height="900"></iframe>
<script>
f.onload = () => {{ const d = f.contentDocument.documentElement;
  const fonts = [...f.contentDocument.querySelectorAll("p, td, th")].map(e => parseFloat(getComputedStyle(e).fontSize));
  document.body.innerHTML = `MEASURED ${{d.scrollWidth}} ${{d.scrollHeight}} ${{Math.min(...fonts)}}`; }};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; .ci/run installs one")
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(render(analysis(), command="hvpop report x"), "utf-8")
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width), "utf-8")
    picture = tmp_path / "page.png"
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    page = (tmp_path / "measure.html").as_uri()
    environment = {**os.environ, "HOME": str(tmp_path)}
    shown = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=5000", "--dump-dom", page],
        capture_output=True, text=True, timeout=120, check=True, env=environment,
    ).stdout  # fmt: skip
    found = re.search(r"MEASURED (\d+) (\d+) ([\d.]+)", shown)
    assert found, shown
    assert int(found[1]) <= width
    assert int(found[2]) > 1500
    assert float(found[3]) >= 13.0
    subprocess.run(
        [BROWSER, *flags, f"--screenshot={picture}", f"--window-size={width},2000", (tmp_path / "page.html").as_uri()],
        capture_output=True, timeout=120, check=True, env=environment,
    )  # fmt: skip
    assert picture.stat().st_size > 20_000  # an empty page takes a few thousand bytes
