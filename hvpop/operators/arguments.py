"""What a caller gives, checked before any work: who expects what, what came, and what to do."""

from __future__ import annotations

import inspect
import math
from numbers import Integral, Real
from typing import Any

import scipy.sparse.linalg
import torch

from .base import LinearOperator
from .basic import LowRank

Seed = int | torch.Generator
"""An integer, or a generator, from which an integer is drawn: equal ones give equal numbers."""


def operator(who: str, A: Any) -> LinearOperator:
    """``A``; refuses what is no operator of hvpop, or has no entries."""
    if not isinstance(A, LinearOperator):
        raise TypeError(f"{who} expects an hvpop.LinearOperator, got {_wrapped(A)}")
    if 0 in A.shape:
        raise ValueError(f"{who} expects an operator that is not empty, got {A!r}")
    return A


def square(who: str, A: Any, instead: str = "") -> LinearOperator:
    """``A``; refuses what is no square operator; ``instead`` is what to do with another."""
    found = operator(who, A)
    if found.shape[0] != found.shape[1]:
        raise ValueError(f"{who} expects a square operator, got {A!r}{instead and '; '}{instead}")
    return found


def symmetric(
    who: str, A: Any, instead: str = "symmetrize it, or take svds of SciPy"
) -> LinearOperator:
    """``A``; refuses what is no symmetric operator; ``instead`` is what to do with another."""
    found = operator(who, A)
    if not found.symmetric:
        raise ValueError(
            f"{who} expects a symmetric operator, got {A!r} with symmetric=False; {instead}, or, if it "
            f"is symmetric, {_said_symmetric(A)}"
        )
    return found


def _said_symmetric(A: LinearOperator) -> str:
    if "symmetric" in inspect.signature(type(A)).parameters:
        return "build it with symmetric=True"
    if isinstance(A, LowRank):
        return "leave W out"
    return "say so: FromFunction(A.matmat, A.shape, dtype=A.torch_dtype, device=A.device, symmetric=True)"


def _wrapped(A: Any) -> str:
    """What came in place of an operator, and how it becomes one."""
    got = type(A).__name__
    if hasattr(A, "toarray"):
        return f"{got}; write a sparse matrix out, hvpop.Dense(A.toarray(), symmetric=True)"
    if isinstance(A, scipy.sparse.linalg.LinearOperator):
        return (
            f"{got}; wrap an operator of SciPy, hvpop.FromFunction(lambda V: "
            "torch.as_tensor(A @ V.cpu().numpy()), A.shape, symmetric=True)"
        )
    if isinstance(A, torch.nn.Module):
        return f"{got}; make an operator of the model, HessianOperator(model, loss, data)"
    return f"{got}; wrap a matrix in hvpop.Dense(matrix, symmetric=True)"


def counts(who: str, least: int = 1, **given: Any) -> None:
    """Refuse what is not an integer, or less than ``least``; None passes."""
    required(who, least, **{name: count for name, count in given.items() if count is not None})


def required(who: str, least: int = 1, **given: Any) -> None:
    """Refuse what is not an integer, or less than ``least``."""
    for name, count in given.items():
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
