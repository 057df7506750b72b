"""Curvature: a risk and a strategy make an operator."""

from .hessian import HessianOperator

__all__ = ["HessianOperator"]
