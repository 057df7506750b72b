"""Hessians of PyTorch models as linear operators that SciPy and torch both take."""

from .curvature import (
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    GradientOperator,
    HessianOperator,
    JacobianOperator,
    block_diagonal,
)
from .operators import (
    BatchForms,
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    FromFunction,
    Identity,
    Layout,
    LinearOperator,
    LowRank,
    Restriction,
)
from .risk import BATCHES, SAMPLES, TOTAL, Average, EmpiricalRisk, outputs
from .strategies import (
    Compiled,
    FiniteDifference,
    ForwardOverReverse,
    HVPStrategy,
    ReverseOverReverse,
)

__version__ = "0.1.0"

__all__ = [
    "BATCHES",
    "SAMPLES",
    "TOTAL",
    "Average",
    "BatchForms",
    "BlockDiagonal",
    "Compiled",
    "Damped",
    "Dense",
    "Diagonal",
    "EmpiricalFisherOperator",
    "EmpiricalRisk",
    "FiniteDifference",
    "FisherOperator",
    "ForwardOverReverse",
    "FromFunction",
    "GaussNewtonOperator",
    "GradientOperator",
    "HVPStrategy",
    "HessianOperator",
    "Identity",
    "JacobianOperator",
    "Layout",
    "LinearOperator",
    "LowRank",
    "Restriction",
    "ReverseOverReverse",
    "block_diagonal",
    "outputs",
]
