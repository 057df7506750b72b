"""What every function here does first: check its operator, and make it ready for many products."""

from __future__ import annotations

from typing import Any

from ..operators import LinearOperator, arguments


def symmetric(
    who: str, A: Any, instead: str = "symmetrize it, or take svds of SciPy"
) -> LinearOperator:
    """``A`` linearized, or an error that says why ``who`` cannot use it."""
    arguments.symmetric(who, A, instead)
    linearized: LinearOperator = A.linearize()
    return linearized


def square(who: str, A: Any) -> LinearOperator:
    """``A`` linearized, or an error if it is not square."""
    checked = operator(who, A)
    if checked.shape[0] != checked.shape[1]:
        raise ValueError(f"{who} expects a square operator, got {A!r}")
    return checked


def operator(who: str, A: Any) -> LinearOperator:
    """``A`` linearized, or an error if it is no hvpop operator."""
    arguments.operator(who, A)
    linearized: LinearOperator = A.linearize()
    return linearized


HUTCHINSON = "method='hutchinson' takes any square one"
"""What to do with an operator that is not symmetric."""
