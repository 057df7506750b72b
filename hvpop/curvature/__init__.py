"""Curvature: a risk and a strategy make an operator."""

from .blocks import block_diagonal
from .check import CheckResult
from .cost import Cost
from .gauss_newton import GaussNewtonOperator
from .hessian import HessianOperator
from .linearized import Linearized, Report

LinearizedHessian = Linearized
"""The name that it had when there was no other matrix."""

__all__ = [
    "CheckResult",
    "Cost",
    "GaussNewtonOperator",
    "HessianOperator",
    "LinearizedHessian",
    "Report",
    "block_diagonal",
]
