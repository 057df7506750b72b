"""Operators: real matrices known only by their products, and the algebra of such matrices."""

from .base import LinearOperator
from .basic import Dense, Diagonal, FromFunction, Identity, LowRank
from .blocks import BlockDiagonal
from .damped import Damped
from .forms import BatchForms
from .layout import Layout
from .restriction import Restriction
from .space import Space

__all__ = [
    "BatchForms",
    "BlockDiagonal",
    "Damped",
    "Dense",
    "Diagonal",
    "FromFunction",
    "Identity",
    "Layout",
    "LinearOperator",
    "LowRank",
    "Restriction",
    "Space",
]
