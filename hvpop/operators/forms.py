"""The quadratic forms of the batches that an operator averages, and the error that their spread tells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

from torch import Tensor


@dataclass(frozen=True, repr=False)
class BatchForms:
    """``v' A_b v`` for every batch b of which an operator is the average, for k columns.

    From `LinearOperator.batch_forms`. All tensors are float64 on the host.

    Notes
    -----
    The standard error takes the batches for independent draws of some samples each, and their mean
    for a ratio of two sums, which is right for ragged ones, too (Cochran 1977, chapter 6). That of
    a sum is for batches of these weights. The interval of 95 % for B batches is the error times
    Student's t of ``B - 1`` degrees of freedom.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> x = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x[:1], x[:1]), (x[1:], x[1:])])
    >>> forms = H.batch_forms(torch.ones(1, 1, dtype=torch.float64))
    >>> forms.values[:, 0], forms.weights  # 2 x'x / n of each batch; n
    (tensor([ 2., 13.], dtype=torch.float64), tensor([1., 2.], dtype=torch.float64))
    >>> forms.average(), forms.standard_error()
    (tensor([9.3333], dtype=torch.float64), tensor([4.8889], dtype=torch.float64))
    """

    values: Tensor  # (batches, k)
    weights: Tensor  # (batches,)
    normalized: bool  # whether the operator is the weighted mean of the A_b, or their weighted sum

    def average(self) -> Tensor:
        """``v' A v``, ``(k,)``."""
        return self.weights @ self.values / self._divisor()

    def standard_error(self) -> Tensor:
        """Of `average` as an estimate of that of the population, ``(k,)``; from two batches on."""
        return self.influence().square().sum(0).sqrt()

    def influence(self) -> Tensor:
        """What each batch does to `average`, ``(batches, k)``: the squares add up to its variance."""
        count = self.weights.shape[0]
        if count < 2:
            raise ValueError(
                f"a standard error expects at least two batches, got {count}; "
                "split the data into smaller batches"
            )
        mean = self.weights @ self.values / self.weights.sum()
        few = sqrt(count / (count - 1))  # deviations from a mean that is estimated are too small
        return self.weights.unsqueeze(1) * (self.values - mean) * few / self._divisor()

    def scaled(self, scale: float) -> BatchForms:
        """Those of ``scale * A``."""
        return replace(self, values=scale * self.values)

    def shifted(self, exact: Tensor) -> BatchForms:
        """Those of ``A + B``, for a ``B`` in which there are no data: ``exact`` is ``v' B v``, ``(k,)``."""
        share = self._divisor() / self.weights.sum()  # of a sum, that each batch has
        return replace(self, values=self.values + share * exact.cpu().double())

    def _divisor(self) -> Tensor:
        return self.weights.sum() if self.normalized else self.weights.new_ones(())

    def __repr__(self) -> str:
        batches, k = self.values.shape
        return f"<forms of {k} columns over {batches} batches>"
