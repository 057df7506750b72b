"""What the spectral functions return: frozen values with their error, their price and how they ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..operators import Space
from ..operators.wording import counted

Status = Literal[
    "converged",
    "max products",
    "unresolved copies",
    "stagnated",
    "low end unresolved",
    "interrupted",
]
"""How a computation ended.

"converged": the error is at most what was asked; "max products": the budget is spent;
"unresolved copies": of `eigsh`, whose budget was spent while a wanted eigenvalue might still be missing;
"stagnated": rounding allows no smaller error; "low end unresolved": of `logdet`, which does not know
the smallest eigenvalues; "interrupted": Ctrl-C, this is what there was.
"""


@dataclass(frozen=True, repr=False)
class Eigenpairs:
    """Eigenvalues in ascending order with their vectors and residuals, from `eigsh`."""

    eigenvalues: Tensor  # (k,)
    eigenvectors: Tensor  # (n, k), orthonormal columns
    residuals: Tensor  # (k,), the norms of A v - lambda v, from products that were really taken
    products: int  # of A with one vector
    status: Status
    # (products, largest residual by recurrence; inf until there are k)
    history: tuple[tuple[int, float], ...] = ()
    data_errors: Tensor | None = None  # (k,), standard errors that come of the data being a sample

    def __repr__(self) -> str:
        k = self.eigenvalues.shape[0]
        if k == 0:
            return f"<no eigenpairs, {counted(self.products, 'product')}, {self.status}>"
        first, last = self.eigenvalues[0].item(), self.eigenvalues[-1].item()
        errors = self.data_errors
        data = "" if errors is None else f"data errors up to {errors.max().item():.1e}, "
        return (
            f"<{counted(k, 'eigenpair')}, {first:.4g} to {last:.4g}, residuals up to "
            f"{self.residuals.max().item():.1e}, {data}{counted(self.products, 'product')}, "
            f"{self.status}>"
        )


@dataclass(frozen=True, repr=False)
class Estimate:
    """A number with its error."""

    value: float
    standard_error: float
    low: float  # the ends of the 95 % confidence interval
    high: float
    products: int  # of A or A' with one vector
    status: Status
    history: tuple[tuple[int, float, float], ...] = ()  # (products, value, error)
    data_error: float | None = None  # the standard error that comes of the data being a sample

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        data = "" if self.data_error is None else f"data error {self.data_error:.1e}, "
        return (
            f"<{self.value:.6g}, 95 % in [{self.low:.6g}, {self.high:.6g}], "
            f"{data}{counted(self.products, 'product')}, {self.status}>"
        )


@dataclass(frozen=True, repr=False)
class DiagonalEstimate:
    """A diagonal with the error of every entry."""

    value: Tensor  # (n,)
    standard_error: Tensor  # (n,)
    low: Tensor  # (n,), the ends of the 95 % confidence interval of each entry
    high: Tensor  # (n,)
    products: int
    status: Status
    history: tuple[tuple[int, float, float], ...] = ()  # (products, norm, error)

    def __repr__(self) -> str:
        error, size = (
            Space.of(x).norms(x) for x in ((self.high - self.low)[:, None] / 2, self.value[:, None])
        )
        return (
            f"<diagonal of {self.value.shape[0]} entries, norm {size.item():.4g} "
            f"+- {error.item():.1e}, {counted(self.products, 'product')}, {self.status}>"
        )


@dataclass(frozen=True, repr=False)
class Density:
    """The density of the eigenvalues, smoothed by a Gaussian of standard deviation `width`."""

    grid: Tensor  # (g,), eigenvalues
    value: Tensor  # (g,), the density there; it integrates to one
    standard_error: Tensor  # (g,)
    low: Tensor  # (g,), the pointwise 95 % confidence band
    high: Tensor  # (g,)
    nodes: Tensor  # (m, probes), where each probe's quadrature sits, or (n, 1), all eigenvalues
    weights: Tensor  # as nodes, how much it puts there; columns sum to one
    width: float
    order: int  # n, the number of eigenvalues
    products: int
    status: Status

    def __repr__(self) -> str:
        nodes, probes = self.nodes.shape
        return (
            f"<density of {counted(self.order, 'eigenvalue')} from {self.grid[0].item():.4g} to "
            f"{self.grid[-1].item():.4g}, {counted(probes, 'probe')} of {counted(nodes, 'node')}, "
            f"{counted(self.products, 'product')}, {self.status}>"
        )
