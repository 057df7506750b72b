"""Matrices by name, for those who choose one in a command or a configuration."""

from __future__ import annotations

from .fisher import FisherOperator
from .gauss_newton import GaussNewtonOperator
from .hessian import HessianOperator
from .live import Live

MATRICES: dict[str, type[Live]] = {
    "hessian": HessianOperator,
    "gauss-newton": GaussNewtonOperator,
    "fisher": FisherOperator,
}


def matrix(name: str) -> type[Live]:
    """The class of a name."""
    if name not in MATRICES:
        raise ValueError(f"expected a matrix in {', '.join(MATRICES)}, got {name!r}")
    return MATRICES[name]
