"""Solvers native to torch, for any operator: they share passes and report true residuals."""

from .block_cg import block_cg
from .cg import cg
from .convergence import NotConverged
from .direct import Direct
from .functions import MatrixFunction, matrix_function
from .inverse import Inverse, pseudoinverse
from .lsmr import lsmr
from .minres import minres
from .multishift import multishift_cg
from .preconditioners import Nystrom, jacobi, nystrom
from .results import (
    FunctionResult,
    LeastSquaresResult,
    MultishiftResult,
    SolveResult,
    SteihaugResult,
    Step,
)
from .steihaug import steihaug
from .woodbury import Woodbury

__all__ = [
    "Direct",
    "FunctionResult",
    "Inverse",
    "LeastSquaresResult",
    "MatrixFunction",
    "MultishiftResult",
    "NotConverged",
    "Nystrom",
    "SolveResult",
    "SteihaugResult",
    "Step",
    "Woodbury",
    "block_cg",
    "cg",
    "jacobi",
    "lsmr",
    "matrix_function",
    "minres",
    "multishift_cg",
    "nystrom",
    "pseudoinverse",
    "steihaug",
]
