"""What the solvers return, and what they show while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..operators.wording import counted

Status = Literal["converged", "negative curvature", "stagnated", "max steps", "interrupted"]

TrustStatus = Literal["converged", "boundary", "negative curvature", "max steps", "interrupted"]


@dataclass(frozen=True)
class Step:
    """What a callback gets after every step; returning True from it ends the run, "interrupted".

    ``x`` may be the solver's own memory: clone it to keep it.
    """

    number: int
    x: Tensor  # (n,) or (n, k), as b
    residual_norms: Tensor  # (k,), by recurrence; the last known one where a column is done
    products: int


Callback = Callable[[Step], bool | None]


@dataclass(frozen=True, repr=False)
class SolveResult:
    """The answer to ``A x = b``, or to ``min |A x - b|``, for k columns; k = 1 for a vector b."""

    x: Tensor  # (n,) or (n, k), as b
    status: tuple[Status, ...]  # (k,)
    residual_norms: Tensor  # (k,), |b - A x| computed from x
    targets: Tensor  # (k,), what counts as converged
    history: Tensor  # (steps + 1, k), by recurrence; nan once a column is done
    steps: int  # block products with A in the recurrence
    products: int  # columns multiplied by A or A', checks included
    directions: Tensor | None = None  # as x: unit d, d'Ad < 0, where curvature is negative, else 0

    @property
    def converged(self) -> bool:
        """Whether every column is."""
        return all(status == "converged" for status in self.status)

    def __repr__(self) -> str:
        return f"<{_ended(self)} residual {worst(self.residual_norms, self.targets)}>"


@dataclass(frozen=True, repr=False)
class LeastSquaresResult(SolveResult):
    """A `SolveResult` whose columns have converged by their gradient ``A'(b - A x) - damping x``.

    `targets` and `history` are of the gradient's norm.
    """

    gradient_norms: Tensor = field(kw_only=True)  # (k,), computed from x

    def __repr__(self) -> str:
        return f"<{_ended(self)} gradient {worst(self.gradient_norms, self.targets)}>"


@dataclass(frozen=True, repr=False)
class MultishiftResult:
    """The answers to ``(A + shifts[i] I) x[i] = b`` for s shifts and k columns."""

    shifts: Tensor  # (s,)
    x: Tensor  # (s, n) or (s, n, k), as b
    status: tuple[tuple[Status, ...], ...]  # (s, k)
    residual_norms: Tensor  # (s, k), |b - (A + shift I) x| computed from x
    targets: Tensor  # (k,)
    history: Tensor  # (steps + 1, s, k), by recurrence; nan once done
    steps: int  # block products with A in the common Krylov space
    products: int  # columns multiplied by A, checks and repairs included

    @property
    def converged(self) -> bool:
        """Whether every column is, for every shift."""
        return all(status == "converged" for row in self.status for status in row)

    def __repr__(self) -> str:
        flat = [status for row in self.status for status in row]
        return (
            f"<{counted(len(self.shifts), 'shift')}: {outcome(flat)} after "
            f"{counted(self.steps, 'step')}, {counted(self.products, 'product')}; "
            f"largest residual {worst(self.residual_norms, self.targets.expand_as(self.residual_norms))}>"
        )


@dataclass(frozen=True, repr=False)
class SteihaugResult:
    """A step ``s`` of a trust-region method, and what the quadratic model expects of it."""

    step: Tensor  # (n,)
    status: TrustStatus
    decrease: float  # -(g's + s'As / 2), positive unless g = 0
    norm: float  # |s|, in the preconditioner's norm where there is one
    residual_norm: float  # |g + A s|, by recurrence
    history: Tensor  # (steps + 1,), |g + A s| by recurrence
    steps: int
    products: int
    direction: Tensor | None = None  # (n,), unit d with d'Ad <= 0 where curvature is negative

    @property
    def on_boundary(self) -> bool:
        """Whether the step has the radius' length: the model wants to go on."""
        return self.status in ("boundary", "negative curvature")

    def __repr__(self) -> str:
        decrease = self.decrease + 0.0  # which makes 0 of -0
        return (
            f"<{self.status} after {counted(self.products, 'product')}: "
            f"step of length {self.norm:.3g}, model decrease {decrease:.3g}, "
            f"residual {self.residual_norm:.2e}>"
        )


@dataclass(frozen=True, repr=False)
class FunctionResult:
    """``f(A) V`` for k columns, with an estimate of its error."""

    y: Tensor  # (n,) or (n, k), as V
    errors: Tensor  # (k,), estimates of |y - f(A) v|
    targets: Tensor  # (k,), what counts as converged
    status: tuple[Status, ...]  # (k,)
    history: Tensor  # (checks, k), the estimates; nan where there is none (yet, or any more)
    steps: int
    products: int

    @property
    def converged(self) -> bool:
        """Whether every column is."""
        return all(status == "converged" for status in self.status)

    def __repr__(self) -> str:
        return f"<{_ended(self)} error estimate {worst(self.errors, self.targets)}>"


def _ended(result: SolveResult | FunctionResult) -> str:
    steps, products = counted(result.steps, "step"), counted(result.products, "product")
    return f"{outcome(result.status)} after {steps}, {products}; largest"


def outcome(status: Sequence[Status]) -> str:
    """One phrase for the statuses of all columns."""
    counts = Counter(status)
    if len(counts) == 1:
        return status[0]
    if not counts:
        return "no columns"
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def worst(norms: Tensor, targets: Tensor) -> str:
    """The norm farthest from its target, with that target."""
    if norms.numel() == 0:
        return "none"
    at = int((norms.flatten() / targets.flatten().clamp_min(1e-300)).argmax())
    return f"{norms.flatten()[at].item():.2e} (target {targets.flatten()[at].item():.2e})"
