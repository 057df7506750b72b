"""What averages over data: one hook is the sum over a pass; division, diagnosis and reports are here."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import NamedTuple, TypeVar

from torch import Tensor, finfo

from ..exchange import guarded
from ..operators import BatchForms, Layout, LinearOperator
from ..risk import EmpiricalRisk
from ..risk.modules import Selection
from ..strategies import FirstThatWorks, HVPStrategy, NoSecondDerivativeError, Params
from ..strategies.base import grad_enabled
from ..strategies.fallback import settled
from .blocks import between
from .check import CheckResult, check
from .cost import Cost, cost, timed
from .diagnosis import culprit, differences_serve, refuse_unreached
from .forms import batch_forms
from .space import WeightedSum, from_point, layout_of, scale_of, space_of, to_point

T = TypeVar("T")


_NOT_FINITE = (
    "{!r}: torch's second derivative of an op is not finite, where differences of gradients show that "
    "there is one"
)


class Place(NamedTuple):
    """Where products are made: the functions, and the point with all else that they depend on."""

    risk: EmpiricalRisk
    point: Params
    state: Params


class DataAverage(LinearOperator):
    """A symmetric matrix over parameters that is the weighted average of one for each batch.

    Three things make one: WHICH matrix a batch's function becomes (``strategy``, which turns it into a
    linear map), WHERE it is taken (`_place`), and HOW batches are averaged (``risk.average``).

    A subclass says how one pass is made: `_summed`, without communication and without division, so
    that the pairs of several processes can be added before.
    """

    _fresh = True

    def __init__(self, risk: EmpiricalRisk, strategy: HVPStrategy, point: Params) -> None:
        dtype, device = space_of(point)
        self._layout = layout_of(point)
        n = self._layout.size
        super().__init__((n, n), dtype=dtype, device=device, symmetric=True)
        self.risk, self.strategy = risk, strategy
        self._dtypes = {p.dtype for p in point.values()}
        self._passes = self._products = 0
        self._seconds = 0.0

    # -- hooks ------------------------------------------------------------------------------------

    def _summed(self, V: Tensor) -> WeightedSum:
        """The sums of ``w_b A_b V`` and of ``w_b`` over the batches of one pass, not divided."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _summed(V)")

    def _place(self) -> Place:
        """Where a product made now would be."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _place()")

    def on_shard(self, rank: int, ranks: int) -> DataAverage:
        """The same matrix of the shard of the data that one of several processes holds."""
        part = copy.copy(self)
        part.risk = self.risk.on_shard(rank, ranks)
        return part

    def strategies_left(self, count: int | None = None) -> int:
        """How many strategies of the chain have not failed; ``count`` of them from now on, if given."""
        if not isinstance(self.strategy, FirstThatWorks):
            return 1
        if count is not None:
            self.strategy.leave(count)
        return len(self.strategy.chain)

    def restricted(self, params: Selection) -> DataAverage:
        """The same matrix of some of the parameters, in the model's order."""
        raise NotImplementedError(
            f"{self!r} has no blocks of its own; take the block of the live operator, then linearize it"
        )

    # -- public -----------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return self._layout

    def block(self, rows: Selection, cols: Selection = None) -> LinearOperator:
        """The block of some parameters (rows) against others (columns, by default the same).

        Parameters
        ----------
        rows, cols
            As ``params=``: names, globs, modules, a predicate.

        Returns
        -------
        LinearOperator
            Shape ``(entries of rows, entries of cols)``; live, with a true transpose.

        Examples
        --------
        >>> import torch
        >>> from hvpop import HessianOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> H.block("0.*", "1.weight").shape
        (9, 3)
        """
        return between(self, rows, cols)

    def check(self, batches: int | None = 1) -> CheckResult:
        """Examine this operator on its first batches (None: on all of them).

        Looks at determinism, symmetry, agreement with finite differences of ``backward()``
        gradients, agreement of the strategies, parameters without gradient, and layers known to be
        difficult. Raises nothing; costs some forty gradients on those batches.

        Examples
        --------
        >>> import torch
        >>> from hvpop import HessianOperator
        >>> model = torch.nn.Linear(2, 1).double()
        >>> data = [(torch.ones(4, 2).double(), torch.ones(4, 1).double())]
        >>> HessianOperator(model, torch.nn.MSELoss(), data).check().verdict
        'healthy'
        """
        return guarded(lambda: check(self, batches))

    def cost(self) -> Cost:
        """What products take: passes, memory that may be kept, seconds; costs three products and a pass.

        Examples
        --------
        >>> import torch
        >>> from hvpop import HessianOperator
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))]
        >>> cost = HessianOperator(torch.nn.Linear(2, 1), torch.nn.MSELoss(), data).cost()
        >>> cost.parameters, cost.batches, cost.fits
        (3, 1, True)
        """
        seconds = timed(self)
        risk, point, state = self._place()
        told = guarded(lambda: cost(self, risk, self.strategy, point, state))
        return replace(told, seconds=seconds)

    # -- products ---------------------------------------------------------------------------------

    def _apply(self, V: Tensor) -> Tensor:
        return guarded(lambda: self._average(V))

    def _average(self, V: Tensor) -> Tensor:
        scale = self.scale(V)
        own = V if scale is None else V / scale
        Y = from_point(self.summed(own).result(), V)
        total = float(Y.sum())  # which tells nearly always that there is nothing to look into
        if not isfinite(total):
            if self._steps_down(own):
                Y = from_point(self.summed(own).result(), V)
            Y = self.examined(Y, own)
        elif total == 0 and not Y.any() and V.any():
            refuse_unreached(*self._place())
        return Y if scale is None else Y * scale

    def scale(self, V: Tensor) -> Tensor | None:
        """What columns are divided by to be of order one, where a parameter could not hold them."""
        return scale_of(V, self._dtypes)

    def summed(self, V: Tensor) -> WeightedSum:
        """`_summed`, with the strategy settled and the time counted."""
        return self._timed(V, lambda: settled(self.strategy, lambda: self._summed(V)))

    def _steps_down(self, V: Tensor) -> bool:
        """Leave a strategy that has no finite product of columns where differences show that there is one."""
        strategy = self.strategy
        if not isinstance(strategy, FirstThatWorks) or len(strategy.chain) < 2:
            return False
        exact = strategy.current
        short = any(finfo(dtype).bits < 32 for dtype in self._dtypes)  # differences are rounding
        if short or not exact.of_gradients or not V.isfinite().all():
            return False
        risk, point, state = self._place()
        columns = to_point(V, self.layout, point)
        with grad_enabled(), risk.place(point, state):
            if not differences_serve(risk.terms(), point, state, exact, columns):
                return False
        strategy.step_down(exact, NoSecondDerivativeError(_NOT_FINITE.format(exact)))
        self.strategies_left(len(strategy.chain))
        return True

    def examined(self, Y: Tensor, V: Tensor) -> Tensor:
        """``Y``, made of the columns ``V``, or an error that says why it is not finite."""
        if not isfinite(float(Y.sum())) and not Y.isfinite().all():
            risk, point, state = self._place()
            columns = to_point(V, self.layout, point)
            found = culprit(risk.terms(), point, state, self.strategy, columns)
            raise FloatingPointError(f"{self!r}: the product is not finite; {found}")
        return Y

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms | None:
        def made() -> BatchForms:
            scale = self.scale(V)
            risk, point, state = self._place()
            columns = to_point(V if scale is None else V / scale, self.layout, point)
            with grad_enabled(), risk.place(point, state):
                found = settled(
                    self.strategy,
                    lambda: batch_forms(risk, self.strategy, point, state, columns, batches),
                )
            if not found.values.isfinite().all():
                why = culprit(risk.terms(), point, state, self.strategy, columns)
                raise FloatingPointError(
                    f"{self!r}: the forms of its batches are not finite; {why}"
                )
            self._passes += 1
            if scale is None:
                return found
            return replace(found, values=found.values * scale.double().square().cpu())

        return guarded(lambda: self._timed(V, made))

    def _timed(self, V: Tensor, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        self._products += V.shape[1]
        self._seconds += time.perf_counter() - start
        return result
