"""The Hessian of an empirical risk as a linear operator."""

from __future__ import annotations

from collections.abc import Iterable

from ..operators import LinearOperator
from ..operators.algebra import Transposed
from ..strategies import HVPStrategy
from .live import Live
from .mixed import InputRows


class HessianOperator(Live):
    """The Hessian of a model's average loss over data, with respect to its parameters.

    Follows the live model: each product is of the Hessian at the parameters of that moment, made in
    one pass over the data with the memory of one batch. For many products at one point take
    `linearize` first. Entry ``i`` belongs to the i-th entry of
    ``torch.nn.utils.parameters_to_vector`` of the trainable parameters; `layout` names them.

    Parameters
    ----------
    model, loss, data, mode, average, params, seed
        As in `EmpiricalRisk`.
    strategy : HVPStrategy, optional
        How to differentiate twice. By default reverse-over-reverse, and where an op of the model
        does not allow that, finite differences with a warning. An explicit strategy never falls
        back: it raises.

    Raises
    ------
    ValueError
        For a model without trainable parameters, a loss that is not a scalar or that sums its
        samples under ``average=SAMPLES``, data without batches.
    FloatingPointError
        If a product is not finite; says at which batch, and whether in the vector, loss or gradient.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    >>> data = [(X, torch.zeros(2, 1, dtype=torch.float64))]
    >>> H = HessianOperator(model, torch.nn.MSELoss(), data)
    >>> H
    <2x2 HessianOperator float64 cpu>
    >>> H.to_dense()  # 2 X'X / n
    tensor([[2., 2.],
            [2., 4.]], dtype=torch.float64)
    """

    def mixed(self, samples: Iterable[int] | None = None) -> LinearOperator:
        """The derivatives of the gradient by inputs of samples, ``d2 L / dtheta dx``.

        How training inputs move a minimum: to first order it follows a change ``dx`` of them by
        ``-Inverse(H) @ H.mixed() @ dx``. Follows the live model, as the Hessian does; both products
        are one pass over the data, by two backward passes.

        Parameters
        ----------
        samples
            Indices in the order of the data, each once; all by default.

        Returns
        -------
        LinearOperator
            Shape ``(n, entries)``: rows are those of the Hessian, columns the entries of the inputs of
            the samples, in the order of the data, of the average over all of them.

        Raises
        ------
        ValueError
            For inputs that are not marked (see `inputs`) or no floating point numbers, such as tokens.

        Examples
        --------
        >>> import torch
        >>> from hvpop import HessianOperator
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x, torch.zeros_like(x))])
        >>> H.mixed().to_dense()  # d/dx of w x^2, which is 2 w x
        tensor([[2., 4.]], dtype=torch.float64)
        """
        return Transposed(InputRows.of(self.risk, samples))

    def _matrix(self, strategy: HVPStrategy) -> HVPStrategy:
        return strategy
