"""The sweep tells right from wrong, and what differences cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.functions import SavedSine

from .judge import judged
from .problems import Called, Problem
from .table import kind, table

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


def doubled(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return y


def halved_twice(x: Tensor) -> Tensor:
    return x.cos() * (1 + (x - x.detach()))


def verdict(op: Callable[[Tensor], Any], *entries: float) -> str:
    x = torch.tensor(entries, dtype=torch.float64, requires_grad=True)
    return judged(Problem("op", "", 0, Called(op, ((x,), {}))), trace=False).verdict


@pytest.mark.parametrize(
    ("op", "entries", "expected"),
    [
        (torch.sin, (0.3, -1.0, 2.0), "right"),
        (torch.sinc, (0.0, 0.4), "right"),
        (torch.nn.functional.hardsigmoid, (0.3, -1.0), "right"),
        (lambda x: torch.norm(x[:2] * 0 + x[:2]), (0.0, 0.0, 1.0), "unknown (refused)"),
        (torch.relu, (0.0, 1.0), "unknown (wrong)"),
        (doubled, (0.3, -1.0), "first gradient"),
        (halved_twice, (0.3, -1.0), "first gradient"),
        (lambda x: x.round(), (0.3, -1.0), "right"),
        (lambda x: x > 0, (0.3, -1.0), "no gradient"),
    ],
)
def test_a_verdict(op: Callable[[Tensor], Any], entries: tuple[float, ...], expected: str) -> None:
    assert verdict(op, *entries) == expected


def test_a_wrong_second_derivative_is_never_called_right() -> None:
    assert verdict(SavedSine.apply, 0.3, -1.0) != "right"


def test_the_table_counts_cases_and_names_what_is_not_plainly_right() -> None:
    lines = [
        {"name": "sin", "verdict": "right", "rewritten": []},
        {"name": "sinc", "verdict": "right", "rewritten": ["sinc"]},
        {"name": "sinc", "verdict": "right", "rewritten": ["sinc"]},
        {"name": "abs", "verdict": "kink (wrong)", "rewritten": []},
        {"name": "x", "verdict": "wrong", "rewritten": []},
    ]
    assert [kind(line) for line in lines] == [
        "right",
        "rewritten",
        "rewritten",
        "singular",
        "wrong",
    ]
    page = table(lines)
    assert "| 2 | right, by a formula of the table above | `sinc` |" in page
    assert "| 1 | wrong | `x` |" in page
    assert "`sin`" not in page
