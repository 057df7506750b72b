"""What a caller gives, checked before any work: who expects what, what came, and what to do."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

from .base import LinearOperator

Seed = int | torch.Generator
"""An integer, or a generator, from which an integer is drawn: equal ones give equal numbers."""


def operator(who: str, A: Any) -> None:
    """Refuse what is no operator of hvpop, or has no entries."""
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"{who} expects an hvpop.LinearOperator, got {type(A).__name__}; "
            "wrap a matrix in hvpop.Dense(matrix, symmetric=True)"
        )
    if 0 in A.shape:
        raise ValueError(f"{who} expects an operator that is not empty, got {A!r}")


def symmetric(who: str, A: Any, instead: str) -> None:
    """Refuse what is no symmetric operator; ``instead`` is what to do with another."""
    operator(who, A)
    if not A.symmetric:
        raise ValueError(
            f"{who} expects a symmetric operator, got {A!r} with symmetric=False; {instead}, or build "
            "it with symmetric=True if it is symmetric"
        )


def counts(who: str, least: int = 1, **given: Any) -> None:
    """Refuse what is not an integer, or less than ``least``; None passes."""
    for name, count in given.items():
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(f"{who} expects {name} as an integer, got {name}={count!r:.60}")
        if count < least:
            raise ValueError(f"{who} expects {name} >= {least}, got {name}={count}")


def seed(who: str, given: Any) -> int:
    """The seed as an integer; a generator is left one number further."""
    if isinstance(given, torch.Generator):
        drawn = torch.randint(2**63 - 1, (), generator=given, device=given.device)
        return int(drawn)
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(
            f"{who} expects seed as an integer or a torch.Generator, got seed={given!r:.60}"
        )
    if not -(2**63) <= int(given) < 2**63:
        raise ValueError(f"{who} expects a seed of at most 63 bits, got seed={given}")
    return int(given)


def positive(who: str, **given: Any) -> None:
    """Refuse what is not a finite number > 0; None passes."""
    for name, number in given.items():
        if number is not None and not 0 < _real(who, name, number) < math.inf:
            raise ValueError(f"{who} expects a finite {name} > 0, got {name}={number}")


def not_negative(who: str, **given: Any) -> None:
    """Refuse what is not a finite number >= 0."""
    for name, number in given.items():
        if not 0 <= _real(who, name, number) < math.inf:
            raise ValueError(f"{who} expects a finite {name} >= 0, got {name}={number}")


def _real(who: str, name: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{who} expects {name} as a number, got {name}={number!r:.60}")
    return float(number)
