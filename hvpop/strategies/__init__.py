"""Strategies: how to differentiate twice. They know autodiff and nothing of data or operators."""

from .base import HVPStrategy, LinearMap, Params, ScalarFunction
from .compiled import Compiled
from .fallback import FirstThatWorks
from .finite_difference import FiniteDifference
from .forward import ForwardOverReverse
from .graphs import NoSecondDerivativeError
from .reverse import ReverseOverReverse

__all__ = [
    "Compiled",
    "FiniteDifference",
    "FirstThatWorks",
    "ForwardOverReverse",
    "HVPStrategy",
    "LinearMap",
    "NoSecondDerivativeError",
    "Params",
    "ReverseOverReverse",
    "ScalarFunction",
]
