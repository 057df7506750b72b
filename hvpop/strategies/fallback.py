"""The strategy chosen for the model: the first of a chain that can differentiate it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from .base import HVPStrategy, LinearMap, Params, ScalarFunction
from .finite_difference import FiniteDifference
from .graphs import NoSecondDerivativeError, OnceDifferentiableError
from .reverse import ReverseOverReverse


class FirstThatWorks(HVPStrategy):
    """Try strategies in order and stay with the first that the model's ops allow.

    The default of every operator, with the chain reverse-over-reverse, finite differences:
    an op without a double backward has no forward-over-backward either, so nothing stands between
    the two. A step down the chain is taken once and warned about, naming the op. Functions marked
    ``once_differentiable`` are refused: their author says that there is no second derivative.

    Examples
    --------
    >>> from hvpop.strategies import FirstThatWorks
    >>> FirstThatWorks().current
    ReverseOverReverse()
    """

    def __init__(self, *strategies: HVPStrategy) -> None:
        self.chain = list(strategies) or [ReverseOverReverse(), FiniteDifference()]

    @property
    def current(self) -> HVPStrategy:
        """The strategy at work."""
        return self.chain[0]

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        def build() -> LinearMap:
            return self.current.linearize(fn, params, *args, differentiable=differentiable)

        return _Retrying(self, build)

    def step_down(self, failed: HVPStrategy, error: NoSecondDerivativeError) -> None:
        """Leave a strategy that failed, unless it was the last."""
        if failed is not self.current:
            return  # another map has found out before
        if len(self.chain) == 1 or isinstance(error, OnceDifferentiableError):
            raise error
        self.chain.pop(0)
        warnings.warn(
            f"{str(error).split(';')[0]}; using {self.current!r} for this operator instead",
            stacklevel=2,
        )

    def __repr__(self) -> str:
        return repr(self.current)


class _Retrying(LinearMap):
    """A map of the chain's current strategy, built again when that changes."""

    def __init__(self, chain: FirstThatWorks, build: Callable[[], LinearMap]) -> None:
        self._chain, self._build = chain, build
        self._built_by: HVPStrategy | None = None
        self._retry(lambda: {})

    def __call__(self, v: Params) -> Params:
        return self._retry(lambda: self._map(v))

    def columns(self, V: Params) -> Params:
        return self._retry(lambda: self._map.columns(V))

    def _retry(self, compute: Callable[[], Params]) -> Params:
        while True:
            current = self._chain.current
            try:
                if self._built_by is not current:
                    self._map, self._built_by = self._build(), current
                return compute()
            except NoSecondDerivativeError as error:
                self._chain.step_down(current, error)
