"""A real matrix known only by its products, native to SciPy and to torch."""

from __future__ import annotations

from numbers import Integral, Number
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from . import crossing
from .forms import BatchForms
from .layout import Layout
from .space import Space

Memory = int | str | None
"""A memory budget: bytes, text such as ``"2GiB"``, or None for the operator's default."""


class LinearOperator(scipy.sparse.linalg.LinearOperator):  # type: ignore[misc]
    """A real linear operator that SciPy's solvers take as it is and that multiplies torch tensors.

    Subclass it by implementing ``_apply(V)``, which maps a tensor of k columns ``(n, k)`` to
    ``(m, k)``, and ``_apply_transpose(U)``, ``(m, k)`` to ``(n, k)``, unless ``symmetric=True``.
    Both may trust their operand (shape, dtype and device are checked) and must not write to it.

    Parameters
    ----------
    shape : tuple of int
        ``(m, n)``.
    dtype : torch.dtype
        float64, float32, or bfloat16/float16, which SciPy sees as float32.
    device : torch.device or str
        Where the products are computed.
    symmetric : bool
        Whether the matrix equals its transpose.

    Attributes
    ----------
    torch_dtype, device
        torch's view; `dtype` is the NumPy dtype that SciPy reads.

    Notes
    -----
    Products carry no autograd graph and ignore an autocast that is on around them.

    Examples
    --------
    >>> import torch
    >>> from hvpop import LinearOperator
    >>> class Ones(LinearOperator):
    ...     def _apply(self, V):
    ...         return V.sum(0, keepdim=True).expand_as(V)
    >>> J = Ones((3, 3), dtype=torch.float64, device="cpu", symmetric=True)
    >>> J @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    tensor([6., 6., 6.], dtype=torch.float64)
    >>> from scipy.sparse.linalg import eigsh
    >>> eigsh(J, k=1, return_eigenvectors=False).round(12)
    array([3.])
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        symmetric: bool = False,
    ) -> None:
        super().__init__(crossing.numpy_dtype(dtype), shape)
        if symmetric and shape[0] != shape[1]:
            raise ValueError(f"a symmetric {type(self).__name__} is square, got shape {shape}")
        self.torch_dtype = dtype
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.symmetric = symmetric

    # -- hooks ------------------------------------------------------------------------------------

    _fresh = False
    """Said beside ``_apply``: its results are new memory, that a sum may be gathered in."""

    _by_parts = False
    """Said beside ``_apply``: the parts and the numbers among the attributes tell the matrix."""

    def _apply(self, V: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not implement _apply(V)")

    def _apply_transpose(self, U: Tensor) -> Tensor:
        if self.symmetric:
            return self._apply(U)
        raise NotImplementedError(
            f"{self!r} has no transpose: implement _apply_transpose(U), or pass symmetric=True"
        )

    def _linearized(self, memory: Memory, done: dict[int, LinearOperator]) -> LinearOperator:
        """Make this matrix ready; ``done`` remembers parts that occur more than once, by id."""
        return self

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms | None:
        """See `batch_forms`; implemented by what averages over data."""
        return None

    def _uses(self, count: int | None = None) -> int:
        """How many products were made, if that decides how the next are; ``count`` from now on, if given.

        A computation that is resumed goes on with the bits that it would have had.
        """
        return 0

    def _gives_fresh(self) -> bool:
        """Whether the classes that implement the hooks say that their results are `_fresh`.

        A class of a user's may keep what it returns.
        """
        order = [kind for kind in type(self).__mro__ if issubclass(kind, LinearOperator)]
        owners = [
            next(k for k in order if hook in vars(k)) for hook in ("_apply", "_apply_transpose")
        ]
        return all(k is LinearOperator or vars(k).get("_fresh", False) for k in owners)

    def _is_by_parts(self) -> bool:
        """Whether the class that implements `_apply` says so: one of a user's may hold more."""
        owner = next(kind for kind in type(self).__mro__ if "_apply" in vars(kind))
        return bool(vars(owner).get("_by_parts", False))

    def _averages_data(self) -> bool:
        """Whether this matrix, or any that it is made of, averages over data."""
        implements = type(self)._batch_forms is not LinearOperator._batch_forms
        parts = self._children()
        return any(part._averages_data() for part in parts) if parts else implements

    @property
    def layout(self) -> Layout | None:
        """Which entries belong to which named parameter, where that is known."""
        layouts = {part.layout for part in self._children() if part.layout is not None}
        known = layouts.pop() if len(layouts) == 1 else None
        return known if known is not None and known.size == self.shape[1] else None

    def _children(self) -> tuple[LinearOperator, ...]:
        return ()

    @property
    def space(self) -> Space:
        """The vectors that this operator multiplies: their inner products, norms and bases at any n."""
        for part in self._children():
            if (space := part.space).shared:
                return space
        return Space(self.shape[1], crossing.working_dtype(self.torch_dtype), self.device)

    @property
    def held(self) -> tuple[int, int]:
        """The shape of this matrix for vectors as they are held here: of parts, if processes share them."""
        shared = [part.held for part in self._children() if part.held != part.shape]
        return shared[0] if shared else self.shape

    # -- products ---------------------------------------------------------------------------------

    def matvec(self, x: Any) -> Any:
        """``A x`` for a vector ``(n,)`` or ``(n, 1)``; a tensor gives a tensor, else an ndarray."""
        return crossing.multiply(self, self._apply, x, self.held, columns=False)

    def rmatvec(self, x: Any) -> Any:
        """``A' x`` for a vector ``(m,)`` or ``(m, 1)``."""
        return crossing.multiply(self, self._apply_transpose, x, self.held[::-1], columns=False)

    def matmat(self, X: Any) -> Any:
        """``A X`` for k columns ``(n, k)`` at once."""
        return crossing.multiply(self, self._apply, X, self.held, columns=True)

    def rmatmat(self, X: Any) -> Any:
        """``A' X`` for k columns ``(m, k)`` at once."""
        return crossing.multiply(self, self._apply_transpose, X, self.held[::-1], columns=True)

    # SciPy's own composite nodes reach for these names; from 1.18 on with operands (..., n).
    def _matvec(self, x: Any) -> Any:
        n = self.shape[1]
        if x.shape in ((n,), (n, 1)):
            return self.matvec(x)
        return self.matmat(x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], self.shape[0])

    def _rmatvec(self, x: Any) -> Any:
        return self.T._matvec(x)

    def _matmat(self, X: Any) -> Any:
        return self.matmat(X)

    def _rmatmat(self, X: Any) -> Any:
        return self.rmatmat(X)

    def dot(self, x: Any) -> Any:
        """``A x``: a product with a vector, a block, a scalar or another operator."""
        if isinstance(x, scipy.sparse.linalg.LinearOperator) or _is_scalar(x):
            return self * x
        crossing.refuse_pieces(self, x)
        ndim = x.ndim if isinstance(x, Tensor) else np.ndim(x)
        return self.matmat(x) if ndim == 2 else self.matvec(x)

    def to_dense(self) -> Tensor:
        """The matrix itself, ``(m, n)``: n products in blocks, for operators that are small.

        Examples
        --------
        >>> import torch
        >>> from hvpop import Diagonal
        >>> Diagonal(torch.tensor([1.0, 2.0])).to_dense()
        tensor([[1., 0.],
                [0., 2.]])
        """
        m, n = self.shape
        dtype = crossing.working_dtype(self.torch_dtype)
        dense = torch.empty(m, n, dtype=dtype, device=self.device)
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            block = torch.zeros(n, stop - start, dtype=dtype, device=self.device)
            block.diagonal(-start).fill_(1.0)
            dense[:, start:stop] = self.matmat(block)
        return dense

    def batch_forms(self, V: Any, *, batches: int | None = None) -> BatchForms | None:
        """The numbers ``v' A_b v`` of every batch b of which this is an average over data.

        Their spread tells how far ``v' A v`` may be from that of the population the data were drawn
        from. One pass over the data, with the memory of one batch, at a product a column.

        Parameters
        ----------
        V : Tensor or ndarray
            Columns, ``(n, k)``.
        batches : int, optional
            Stop after so many.

        Returns
        -------
        BatchForms or None
            None if this is no average over data. A Hessian is one, and so it is scaled, damped, or
            added to matrices that have no data in them; those add ``v' B v`` to every batch.

        Raises
        ------
        ValueError
            For a sum of several averages: which batch of one belongs to which of another is not known.
        """
        if batches is not None and (not isinstance(batches, Integral) or batches < 1):
            raise ValueError(f"batch_forms expects an integer batches > 0, got {batches!r}")
        return crossing.forms(self, lambda V: self._batch_forms(V, batches), V)

    # -- life cycle -------------------------------------------------------------------------------

    def linearize(self, *, memory: Memory = None) -> LinearOperator:
        """The same matrix as it is now, made ready for many products.

        Composites rebuild themselves from linearized parts; an operator with nothing to prepare
        returns itself.

        Parameters
        ----------
        memory
            What may be kept to make products cheap: bytes, text such as ``"2GiB"``, or None for
            the operator's default.
        """
        return self._linearized(memory, {})

    def is_current(self) -> bool:
        """Whether a linearized operator still is the matrix of the live model."""
        return all(part.is_current() for part in self._children())

    def report(self) -> object:
        """What a linearized operator keeps and has cost; prints as text, empty if nothing."""
        return "\n".join(filter(None, (str(part.report()) for part in self._children())))

    # -- algebra ----------------------------------------------------------------------------------

    def _transpose(self) -> LinearOperator:
        from .algebra import Transposed

        return self if self.symmetric else Transposed(self)

    def _adjoint(self) -> LinearOperator:
        return self._transpose()  # real matrices only

    def __add__(self, other: Any) -> Any:
        from .algebra import Sum

        if isinstance(other, LinearOperator):
            return Sum(self, other)
        if _is_scalar(other):
            raise TypeError(
                f"{self!r} + {other} is not a sum of matrices; "
                f"write A + {other} * Identity.like(A) to shift the diagonal"
            )
        if isinstance(other, np.ndarray | Tensor):
            raise TypeError(f"{self!r} + array: wrap the array, A + Dense(array)")
        return super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else self + other  # for sum([...])

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __neg__(self) -> Any:
        return -1.0 * self

    def __mul__(self, other: Any) -> Any:
        from .algebra import Scaled, times

        if isinstance(other, LinearOperator):
            return times(self, other)
        if _is_scalar(other):
            return Scaled(_real(self, other), self)
        if isinstance(other, scipy.sparse.linalg.LinearOperator):
            return super().dot(other)
        return self.dot(other)

    def __rmul__(self, other: Any) -> Any:
        return self * other if _is_scalar(other) else self.__rmatmul__(other)

    def __truediv__(self, other: Any) -> Any:
        if not _is_scalar(other):
            raise TypeError(f"{self!r} can be divided by a scalar, got {type(other).__name__}")
        return self * (1.0 / _real(self, other))

    def __matmul__(self, other: Any) -> Any:
        if _is_scalar(other):
            raise ValueError(f"{self!r} @ {other}: use * to multiply by a scalar")
        return self * other

    def __rmatmul__(self, other: Any) -> Any:
        if _is_scalar(other):
            raise ValueError(f"{other} @ {self!r}: use * to multiply by a scalar")
        crossing.refuse_pieces(self, other)
        left = other if hasattr(other, "ndim") else np.asarray(other)
        return self.rmatmat(left.T).T if left.ndim == 2 else self.rmatvec(left)

    def __pow__(self, power: Any) -> Any:
        from .algebra import Power

        return Power(self, power)

    # -- NumPy functions that meet an operator ----------------------------------------------------

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        # scipy.optimize writes np.dot(hess, p) in trust-krylov and trust-ncg; all else is let through
        if func is np.dot and len(args) == 2 and not kwargs:
            left, right = args
            return left * right
        return func._implementation(*args, **kwargs)

    # -- text -------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        dtype = str(self.torch_dtype).removeprefix("torch.")
        return f"<{self.shape[0]}x{self.shape[1]} {self._label()} {dtype} {self.device}>"

    def __str__(self) -> str:
        lines = [repr(self)]
        children = self._children()
        for i, child in enumerate(children):
            last = i == len(children) - 1
            first, *rest = str(child).splitlines()
            lines.append(("└─ " if last else "├─ ") + first)
            lines += [("   " if last else "│  ") + line for line in rest]
        return "\n".join(lines)

    def _label(self) -> str:
        return type(self).__name__


_BLOCK = 128  # columns at a time in to_dense: enough to amortize a pass, little memory


def _is_scalar(x: Any) -> bool:
    return x.ndim == 0 if isinstance(x, Tensor | np.ndarray) else isinstance(x, Number)


def _real(A: LinearOperator, scalar: Any) -> float:
    value = scalar.item() if isinstance(scalar, Tensor | np.ndarray | np.generic) else scalar
    if isinstance(value, complex):
        raise TypeError(f"{A!r} is real; it cannot be scaled by the complex number {value}")
    return float(value)
