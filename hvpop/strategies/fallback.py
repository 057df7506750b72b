"""The strategy chosen for the model: the first of a chain that can differentiate it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from .base import HVPStrategy, LinearMap, Params, ScalarFunction
from .finite_difference import FiniteDifference
from .graphs import NoSecondDerivativeError, OnceDifferentiableError
from .reverse import ReverseOverReverse

T = TypeVar("T")


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

    def within(self, wrap: Callable[[HVPStrategy], HVPStrategy]) -> FirstThatWorks:
        return FirstThatWorks(*(strategy.within(wrap) for strategy in self.chain))

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        return self.current.linearize(fn, params, *args, differentiable=differentiable)

    def once(self, fn: ScalarFunction, params: Params, *args: object) -> LinearMap:
        return self.current.once(fn, params, *args)

    def of(self, strategy: HVPStrategy) -> HVPStrategy:
        return self.current.of(strategy)

    @property
    def of_gradients(self) -> bool:  # type: ignore[override]
        return self.current.of_gradients

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

    def leave(self, count: int) -> None:
        """Take the strategy with which so many of the chain are left, as other processes do."""
        del self.chain[: len(self.chain) - count]

    def __repr__(self) -> str:
        return repr(self.current)


def settled(strategy: HVPStrategy, compute: Callable[[], T]) -> T:
    """What ``compute()`` returns, tried again after each step of `FirstThatWorks` down its chain.

    An op may turn out to have no second derivative as late as in a product, so what is tried again
    is everything from the first `linearize` on.
    """
    while True:
        used = strategy.current if isinstance(strategy, FirstThatWorks) else strategy
        try:
            return compute()
        except NoSecondDerivativeError as error:
            if not isinstance(strategy, FirstThatWorks):
                raise
            strategy.step_down(used, error)
