"""The tables of docs/models.md are those of the zoo and of the rewrites as they are now."""

from __future__ import annotations

import re

import pytest
import torch

from hvpop.risk.rewrites import REWRITES

from .registry import CASES
from .table import PAGE, TABLES, load, rewritten, written

PINNED = re.search(r"torch==([\d.]+)", (PAGE.parents[1] / "constraints.txt").read_text())
assert PINNED is not None


@pytest.mark.skipif(
    torch.__version__.split("+")[0] != PINNED[1],
    reason=f"the page is of torch {PINNED[1]}; docs/versions.md has what others differ in",
)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_page_is_up_to_date(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if "hugging_face" not in load():  # made with transformers, and compared without
        page = without_hugging_face(page)
        fresh = without_hugging_face(written(page, [name]))
    else:
        fresh = written(page, [name])
    assert fresh == page, "stale: run python -m tests.zoo.table"


def without_hugging_face(page: str) -> str:
    return "\n".join(
        line for line in page.split("\n") if not line.startswith(("| hugging_face ", "| all "))
    )


def test_every_rewritten_op_is_listed_with_a_reason() -> None:
    rows = rewritten()[1:]
    missing = not hasattr(torch.nn.functional, "linear_cross_entropy")  # new in 2.13
    assert sum(names.count("`") // 2 for names, _ in rows) == len(REWRITES) + missing
    assert all(reason for _, reason in rows)


def test_a_stale_page_is_noticed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    load()
    assert f"| all | {len(CASES)} |" in page or "hugging_face" not in load()
    stale = page.replace("| all | ", "| all | 1")
    assert written(stale, ["zoo"]) != stale


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- zoo: begin --> and <!-- zoo: end -->, each once"):
        written("nothing")
