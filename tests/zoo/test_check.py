"""The doctor agrees with the zoo: what is right there is healthy, what a convention decides is told."""

from __future__ import annotations

import pytest

from .registry import CASES, Case
from .table import load
from .test_zoo import built, operator

load()
SAMPLE = 12  # every how many cases; all of them take a minute
EXACT = [c for c in CASES.values() if c.reference == "difference" and c.symmetric]
RIGHT = [
    c
    for c in EXACT
    if c.refused is None and c.warns is None and c.name != "detached_in_closed_form"
]
STOPPED = [c for c in CASES.values() if c.family == "stopped" and c.reference != "difference"]


def name_of(case: Case) -> str:
    return f"{case.family}-{case.name}"


@pytest.mark.parametrize("case", RIGHT[::SAMPLE], ids=name_of)
def test_a_right_operator_is_healthy(case: Case) -> None:
    with case.caller():
        result = operator(case, built(case)).check()
    assert result.healthy, str(result)


@pytest.mark.parametrize("case", STOPPED, ids=name_of)
def test_a_stopped_gradient_is_told(case: Case) -> None:
    result = operator(case, built(case)).check()
    assert "stop-gradient" in str(result)
