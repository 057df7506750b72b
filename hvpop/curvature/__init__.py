"""Curvature: a risk and a strategy make an operator."""

from .blocks import block_diagonal
from .check import CheckResult
from .empirical_fisher import EmpiricalFisherOperator
from .fisher import FisherOperator
from .gauss_newton import GaussNewtonOperator
from .gradients import GradientOperator
from .hessian import HessianOperator
from .jacobian import JacobianOperator
from .linearized import Linearized, Report

LinearizedHessian = Linearized
"""The name that it had when there was no other matrix."""

__all__ = [
    "CheckResult",
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "GradientOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearizedHessian",
    "Report",
    "block_diagonal",
]
