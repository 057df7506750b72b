"""A diagonal plus a low rank, told from how an operator is made: what is known of it without a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import crossing
from .algebra import Scaled, Sum, Transposed
from .base import LinearOperator
from .basic import Diagonal, Identity, LowRank
from .damped import Damped
from .space import Space


@dataclass(frozen=True)
class Split:
    """``diag(d) + U diag(s) W'``; what is added up over n is added up in float64."""

    d: Tensor  # (n,)
    U: Tensor  # (n, r)
    s: Tensor  # (r,)
    W: Tensor  # (n, r), U itself in a symmetric one

    @property
    def rank(self) -> int:
        """r, which the low rank does not exceed."""
        return self.s.shape[0]

    def size(self) -> float:
        """No less than the norm, and no more than ``r + 1`` times that of its terms."""
        space = Space.of(self.U)
        terms = self.s.double().abs() * space.norms(self.U) * space.norms(self.W)
        return float(self.d.abs().max() + terms.sum())

    def logdet(self) -> tuple[int, float]:
        """The sign of the determinant, and the logarithm of its size (Sylvester 1857)."""
        sign, size = torch.linalg.slogdet(self.capacitance())
        negative = int((self.d < 0).sum()) % 2 == 1
        return int(sign) * (-1 if negative else 1), float(self.d.double().abs().log().sum() + size)

    def capacitance(self) -> Tensor:
        """``I + diag(s) W' diag(d)^-1 U``, ``(r, r)`` float64: as regular as the matrix is."""
        space, r = Space.of(self.U), self.rank
        C = torch.eye(r, dtype=torch.float64, device=self.U.device)
        for start in range(0, r, _BLOCK):
            part = slice(start, start + _BLOCK)
            C[:, part] += self.s.double()[:, None] * space.inner(
                self.W, self.U[:, part] / self.d[:, None]
            )
        return C


def split(A: LinearOperator) -> Split | None:
    """``A`` as a diagonal plus a low rank, if it is made of such; shares their memory where it can."""
    # not by what a user's does
    made_by = next(kind for kind in type(A).__mro__ if "_apply" in vars(kind))
    rule = _RULES.get(made_by)
    return None if rule is None or A.shape[0] != A.shape[1] else rule(A)


def _diagonal(A: LinearOperator, d: Tensor) -> Split:
    dtype = crossing.working_dtype(A.torch_dtype)
    d = d.to(dtype).expand(A.shape[0])
    none = d.new_empty(A.shape[0], 0)
    return Split(d, none, none[0], none)


def _low_rank(A: LowRank) -> Split:
    zero = _diagonal(A, A.s.new_zeros(()))
    U, s, W = (factor.to(zero.d.dtype) for factor in (A.U, A.s, A.W))
    return replace(zero, U=U, s=s, W=U if A.symmetric else W)


def _scaled(A: Scaled) -> Split | None:
    part = split(A.parts[0])
    return part and replace(part, d=A.scale * part.d, s=A.scale * part.s)


def _transposed(A: Transposed) -> Split | None:
    part = split(A.parts[0])
    return part and replace(part, U=part.W, W=part.U)


def _damped(A: Damped) -> Split | None:
    if type(A).damping is not Damped.damping:
        return None
    part = split(A.operator)
    return part and replace(part, d=part.d + A._damping.to(part.d).reshape(-1))


def _sum(A: Sum) -> Split | None:
    parts = []
    for term in A.parts:
        part = split(term)
        if part is None:
            return None
        parts.append(part)
    d = parts[0].d
    for part in parts[1:]:
        d = d + part.d
    low = [part for part in parts if part.rank] or parts[:1]
    if len(low) == 1:
        return replace(low[0], d=d)
    U, W = (torch.cat([getattr(part, name) for part in low], 1) for name in "UW")
    symmetric = all(part.W is part.U for part in low)
    return Split(d, U, torch.cat([part.s for part in low]), U if symmetric else W)


_BLOCK = 64  # columns of U over d at a time
_RULES: dict[type, Callable[[Any], Split | None]] = {
    Identity: lambda A: _diagonal(A, torch.ones((), device=A.device)),
    Diagonal: lambda A: _diagonal(A, A.d),
    LowRank: _low_rank,
    Scaled: _scaled,
    Transposed: _transposed,
    Damped: _damped,
    Sum: _sum,
}
