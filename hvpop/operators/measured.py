"""An operator in units of its own size: no square over- or underflows, nothing passes that is not finite."""

from __future__ import annotations

import math

from torch import Tensor

from .algebra import Composite
from .base import LinearOperator
from .space import Space


def unit(Y: Tensor, V: Tensor | None = None, space: Space | None = None) -> float:
    """A power of two near the largest entry of ``Y``, in units of that of ``V``; 1 if it is near 1.

    Dividing by it changes no digit. 0 for zero.
    """
    largest = float((space or Space.of(Y)).largest(Y).max()) if Y.numel() else 0.0
    if largest == 0.0:
        return 0.0
    exponent = math.frexp(largest)[1]
    if V is not None:
        exponent -= math.frexp(float((space or Space.of(V)).largest(V).max()))[1]
    # a square of 2^20 times anything usual exists in every dtype
    return 1.0 if abs(exponent) <= 20 else math.ldexp(1.0, max(-1070, min(exponent, 1023)))


def finite(who: str, A: LinearOperator, Y: Tensor) -> None:
    """Refuse a product of ``A`` that is not finite."""
    if not A.space.sized(Y.shape[0]).finite(Y):
        raise FloatingPointError(
            f"{who}({A!r}): a product is not finite; "
            "look for non-finite entries in the model, the data or the damping"
        )


class Measured(Composite):
    """``A / unit``, with the unit that its first product shows."""

    def __init__(self, who: str, A: LinearOperator) -> None:
        super().__init__((A,), A.shape, symmetric=A.symmetric)
        self.who = who
        self._unit = [0.0]  # shared with what is made of this one
        self.taken: list[tuple[Tensor, Tensor]] | None = None  # products with ``A``, if wanted

    @property
    def unit(self) -> float:
        """1 as long as all products have been zero."""
        return self._unit[0] or 1.0

    @unit.setter
    def unit(self, unit: float) -> None:
        self._unit[0] = unit

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        Y = self._in_units(self.parts[0], V)
        if self.taken is not None:
            self.taken.append((V, Y))
        return Y

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self._in_units(self.parts[0].T, U)

    def _in_units(self, A: LinearOperator, V: Tensor) -> Tensor:
        # small entries of a small product would underflow: those of a larger vector do not
        lift = max(self._unit[0], 2.0**-100) if 0.0 < self._unit[0] < 1.0 else 1.0
        Y: Tensor = A @ (V if lift == 1.0 else V / lift)
        finite(self.who, self.parts[0], Y)
        if self._unit[0] == 0.0:
            self._unit[0] = unit(Y, V, A.space if A.space.shared else None)
        rest = self.unit / lift
        return Y if rest == 1.0 else Y.div_(rest)
