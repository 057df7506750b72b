"""Curvature: a risk and a strategy make an operator."""

from .blocks import block_diagonal
from .check import CheckResult
from .hessian import HessianOperator
from .linearized import LinearizedHessian, Report

__all__ = ["CheckResult", "HessianOperator", "LinearizedHessian", "Report", "block_diagonal"]
