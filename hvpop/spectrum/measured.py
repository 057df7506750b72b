"""An operator in units of its own size: no square over- or underflows, nothing passes that is not finite."""

from __future__ import annotations

import math

from torch import Tensor

from ..operators import LinearOperator
from ..operators.algebra import Composite


class Measured(Composite):
    """``A / unit``, with the power of two near the largest entry of its first product as the unit."""

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

    def _apply(self, V: Tensor) -> Tensor:
        Y = self._in_units(self.parts[0] @ V)
        if self.taken is not None:
            self.taken.append((V, Y))
        return Y

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self._in_units(self.parts[0].T @ U)

    def _in_units(self, Y: Tensor) -> Tensor:
        # what is not finite makes the sum so, which is read faster than every entry
        if not bool(Y.sum().isfinite()) and not bool(Y.isfinite().all()):
            raise FloatingPointError(
                f"{self.who}({self.parts[0]!r}): a product is not finite; "
                "look for non-finite entries in the model, the data or the damping"
            )
        if self._unit[0] == 0.0 and bool(Y.any()):
            self._unit[0] = math.ldexp(0.5, math.frexp(float(Y.abs().max()))[1])
        return Y / self.unit
