"""A direct solver for a diagonal plus a low rank, and for products of such."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..operators import LinearOperator, Space, arguments
from ..operators.algebra import Power, Product, Scaled
from ..operators.splitting import Split, split
from . import checks
from .cg import cg
from .results import SolveResult

Solver = Callable[[LinearOperator, Tensor], SolveResult | Tensor]


class Woodbury:
    """Solve ``A x = b`` directly where ``A`` is a diagonal plus a low rank, else by another solver.

    Such are sums and multiples of `Identity`, `Diagonal` and `LowRank`, `Damped` ones, and products and
    powers of these. Weights may have any sign, factors need not be independent; the diagonal must have no
    zero. The answer is refined and held to its residual. Where that is worse than the rounding of ``A x``
    explains, because ``A`` is singular or nearly so, the other solver has its turn.

    Parameters
    ----------
    otherwise : callable
        A solver as `Inverse` takes it.
    rtol
        "converged" is a solution with ``|b - A x| <= rtol * |b|``; refined to rounding, most are far better.
        "stagnated" is one that is not, where rounding allows no better: eps times the condition number
        is above ``rtol``.

    Notes
    -----
    ``A^-1 = D^-1 - D^-1 U (I + S W' D^-1 U)^-1 S W' D^-1`` (M. A. Woodbury 1950), in a form that inverts
    none of the weights; at least one step of refinement keeps it stable where ``D`` is small beside the low
    rank (E. L. Yip 1986). With n rows and rank r, ``2 n r^2`` operations for the factors, which are kept for
    the next solve with the same operator, and about ``16 n r`` a column; memory one block ``(n, 64)``.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Damped, LowRank
    >>> from hvpop.solvers import Woodbury
    >>> A = Damped(LowRank(torch.ones(3, 1, dtype=torch.float64)), 1.0)
    >>> Woodbury()(A, torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)).x
    tensor([ 3., -1., -1.], dtype=torch.float64)
    >>> round(Woodbury().logdet(A), 6)  # log 4
    1.386294
    """

    def __init__(self, otherwise: Solver = cg, *, rtol: float = 1e-5) -> None:
        if not callable(otherwise):
            raise TypeError(f"Woodbury expects another solver, such as cg, got {otherwise!r:.60}")
        arguments.not_negative("Woodbury", rtol=rtol)
        self.otherwise, self.rtol = otherwise, rtol
        self._of: LinearOperator | None = None
        self._factors: list[_Factor] = []

    def __call__(self, A: LinearOperator, b: Tensor) -> SolveResult | Tensor:
        """``A^-1 b`` for ``(n,)`` or ``(n, k)``."""
        arguments.operator("Woodbury", A)
        kept = A is self._of
        while kept or self._factorize(A):
            result = self._solved(A, b)
            if result.converged or self._is_rounding(result):
                return result
            if not kept:
                break
            kept = False  # entries that are shared may have been written to since
        self._of = None
        return self.otherwise(A, b)

    def logdet(self, A: LinearOperator) -> float:
        """``log det A``, for a positive determinant."""
        factors = splits(A)
        if factors is None:
            return logdet_by(self.otherwise, A, f"{A!r} is no diagonal plus low rank, and")
        signs, sizes = zip(*(factor.logdet() for factor in factors), strict=True)
        negative = sum(sign < 0 for sign in signs) % 2
        if negative or 0 in signs:
            raise ValueError(
                f"Woodbury: the determinant of {A!r} is {'negative' if negative else 'zero'}; it has no "
                "logarithm"
            )
        return math.fsum(sizes)

    def _factorize(self, A: LinearOperator) -> bool:
        """Whether there are factors now."""
        found = splits(A)
        self._of = None if found is None else A
        self._factors = [_Factor(part) for part in found or ()]
        return found is not None

    def _solved(self, A: LinearOperator, b: Tensor) -> SolveResult:
        B = checks.columns("Woodbury", A, b)
        size = checks.norms(B)
        X, change = torch.zeros_like(B), self._inverse(B)
        error, history = torch.full_like(size, torch.inf), []
        for _ in range(_REFINEMENTS + 1):
            R: Tensor = B - A @ (X + change)
            now = checks.norms(R)
            history.append(now)
            better = now < error
            gain = bool((now < error / 2).any())
            X, error = torch.where(better, X + change, X), torch.where(better, now, error)
            if not gain or not bool((error > _FLOOR * torch.finfo(B.dtype).eps * size).any()):
                break
            change = self._inverse(R)
        targets = self.rtol * size
        good = error <= targets
        return SolveResult(
            x=X.reshape(b.shape),
            status=tuple("converged" if one else "stagnated" for one in good.tolist()),
            residual_norms=error,
            targets=targets,
            history=torch.stack(history),
            steps=len(history) - 1,
            products=len(history) * B.shape[1],
        )

    def _is_rounding(self, result: SolveResult) -> bool:
        """Whether ``A x`` could not be nearer to b for the rounding of ``x`` alone."""
        size = math.prod(factor.split.size() for factor in self._factors)
        X = result.x.reshape(result.x.shape[0], -1)
        allowed = _FLOOR * torch.finfo(X.dtype).eps * size * checks.norms(X)
        return bool((result.residual_norms <= torch.maximum(result.targets, allowed)).all())

    def _inverse(self, V: Tensor) -> Tensor:
        for factor in self._factors:
            V = factor.inverse(V)
        return V


class _Factor:
    """The inverse of a diagonal plus a low rank."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._LU, self._pivots, _ = torch.linalg.lu_factor_ex(split.capacitance())

    def inverse(self, V: Tensor) -> Tensor:
        d, U, s, W = self.split.d[:, None], self.split.U, self.split.s, self.split.W
        V = V / d
        if not self.split.rank:
            return V
        inside: Tensor = s.double()[:, None] * Space.of(W).inner(W, V)
        inside = torch.linalg.lu_solve(self._LU, self._pivots, inside)
        return V - U @ inside.to(V.dtype) / d


def logdet_by(solver: Solver, A: LinearOperator, who: str) -> float:
    """``log det A`` by a solver that knows it."""
    logdet = getattr(solver, "logdet", None)
    if logdet is None:
        name = getattr(solver, "__name__", type(solver).__name__)
        raise TypeError(
            f"{who} its solver {name} does not give the determinant; use solve=Direct(), or an "
            "estimate, hvpop.spectrum.logdet(A)"
        )
    return float(logdet(A))


def splits(A: LinearOperator) -> list[Split] | None:
    """``A`` as a product of matrices that can be inverted, first on the left; None if it is none."""
    if type(A) is Product:
        chain = [splits(part) for part in A.parts]
        return None if None in chain else [one for part in chain if part for one in part]
    if type(A) is Power:
        base = splits(A.parts[0])
        return None if base is None or A.power == 0 else base * A.power
    found = split(A)
    if found is not None:
        easy = found.rank < A.shape[0] and bool((found.d != 0).all())
        return [found] if easy else None
    if type(A) is Scaled and A.scale != 0:
        base = splits(A.parts[0])
        if base is not None:
            first, *others = base
            return [Split(A.scale * first.d, first.U, A.scale * first.s, first.W), *others]
    return None


_REFINEMENTS = 4
_FLOOR = 4  # roundings that no residual is worth less than
