"""The benchmarks run, with whichever peers are there, and their numbers are numbers."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the smallest workload leaves in two rounds: a command of its own, as users run it."""
    output = tmp_path_factory.mktemp("benchmarks")
    done = subprocess.run(
        [
            *(sys.executable, HERE / "run.py", "--workloads", "tiny", "--repeats", "2"),
            *("--no-compiler", "--no-scaling", "--output", output),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "benchmarks.json").read_text())
    return found | {"printed": done.stdout, "folder": output}


def test_each_product_of_hvpops_is_right_to_rounding(record):
    ours = [row for row in record["rows"] if row["ours"]]
    assert {row["entrant"] for row in ours} == {
        "hvpop",
        "hvpop, linearized",
        "hvpop, Compiled without compiler",
    }
    for row in ours:
        # Sums over at most 1024 samples in float32: some tens of its epsilon, 6e-8.
        assert row["status"] == "right", row
        assert row["error"] < 5e-6, row


def test_whoever_has_an_answer_has_a_time(record):
    answered = [row for row in record["rows"] if row["status"] in ("right", "wrong")]
    assert len(answered) >= 9  # hvpop's and those by hand, on two questions
    for row in answered:
        numbers = [row[key] for key in ("median", "least", "ratio", "setup", "limit")]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row


def test_a_peer_without_an_answer_is_shown_with_the_reason(record):
    peers = [row for row in record["rows"] if not row["ours"] and "by hand" not in row["entrant"]]
    assert {row["entrant"].partition(",")[0] for row in peers} == {
        "pyDVL",
        "curvlinops",
        "hessian-eigenthings",
        "PyHessian",
    }
    for row in peers:
        known = row["status"] in ("right", "wrong", "not installed")
        assert known or row["status"].startswith("fails: "), row
        assert row["entrant"] in record["printed"]


def test_the_record_says_what_it_was_made_with(record):
    assert record["machine"]["threads"] == 1
    assert record["versions"]["torch"].startswith("2.")


def test_a_record_can_be_read_again_and_added_to(record, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    report = importlib.import_module("report")
    rows, curves = report.load(record["folder"])
    assert json.loads(json.dumps([row.record() for row in rows])) == record["rows"]
    assert curves == []


def test_the_page_shows_what_was_measured(record, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    page = importlib.import_module("page")
    row = next(r for r in record["rows"] if r["entrant"] == "hvpop, linearized")
    filled = page.filled("<!-- measured: targets -->\nold\n<!-- end -->", record)
    assert "old" not in filled
    assert all(f"{outcome['ratio']:.2f}" in filled for outcome in record["targets"])
    assert page._ratio(row) == f"**{row['ratio']:.2f}**"
    assert page._ratio(row | {"status": "wrong"}).endswith(f"(wrong by {row['error']:.0e})")


def test_the_page_is_complete():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- measured: [a-z ]+ -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert len(tables) == text.count("<!-- measured:") == 6
    for picture in re.findall(r"\]\((images/[a-z]+\.png)\)", text):
        assert (ROOT / "docs" / picture).stat().st_size > 10_000
