"""Operators that start an expression: identity, diagonal, dense, low rank, any function."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from . import crossing
from .base import LinearOperator
from .crossing import NDArrayAny


class Identity(LinearOperator):
    """The identity of order ``n``.

    Examples
    --------
    >>> from hvpop import Identity
    >>> 0.5 * Identity(3)
    <3x3 Scaled(0.5) float64 cpu>
    """

    def __init__(
        self, n: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
            raise ValueError(
                f"Identity expects its order, an integer >= 0, got {n!r:.60}; "
                "Identity.like(A) takes it from an operator"
            )
        super().__init__((n, n), dtype=dtype, device=device, symmetric=True)

    @classmethod
    def like(cls, A: LinearOperator) -> Identity:
        """The identity with the order, dtype and device of the square operator ``A``."""
        if not isinstance(A, LinearOperator):
            raise TypeError(f"Identity.like expects an operator of hvpop, got {type(A).__name__}")
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"Identity.like expects a square operator, got {A!r}")
        return cls(A.shape[0], dtype=A.torch_dtype, device=A.device)

    def _apply(self, V: Tensor) -> Tensor:
        return V


class Diagonal(LinearOperator):
    """``diag(d)`` for a tensor or array ``d`` of shape ``(n,)``, whose memory it shares.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> Diagonal(torch.tensor([1.0, 2.0])) @ torch.tensor([3.0, 4.0])
    tensor([3., 8.])
    """

    _fresh = True

    def __init__(self, d: Tensor | NDArrayAny) -> None:
        self.d = _entries("Diagonal", d, ndim=1)
        n = self.d.shape[0]
        super().__init__((n, n), dtype=self.d.dtype, device=self.d.device, symmetric=True)

    def _apply(self, V: Tensor) -> Tensor:
        d = self.d.to(V.dtype)
        if not V.T.is_contiguous():
            return d.unsqueeze(1) * V
        return torch.mul(d, V.T, out=crossing.empty(V.T.shape, V.dtype, V.device)).T


class Dense(LinearOperator):
    """A matrix of shape ``(m, n)`` given by its entries, whose memory it shares.

    ``symmetric=True`` is checked against them.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Dense
    >>> A = Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> A.T @ torch.tensor([1.0, 0.0])
    tensor([1., 2.])
    """

    _fresh = True

    def __init__(self, matrix: Tensor | NDArrayAny, *, symmetric: bool = False) -> None:
        self.matrix = _entries("Dense", matrix, ndim=2)
        m, n = self.matrix.shape
        super().__init__(
            (m, n), dtype=self.matrix.dtype, device=self.matrix.device, symmetric=symmetric
        )
        if symmetric and not torch.allclose(self.matrix, self.matrix.T):
            raise ValueError(f"{self!r}: symmetric=True, but the matrix differs from its transpose")

    def _apply(self, V: Tensor) -> Tensor:
        return self.matrix.to(V.dtype) @ V

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self.matrix.T.to(U.dtype) @ U


class LowRank(LinearOperator):
    """``U diag(s) W'`` for ``U`` of shape ``(m, r)`` and ``W`` of shape ``(n, r)``.

    Without ``W``, or with one equal to ``U``, it is the symmetric ``U diag(s) U'``; without ``s`` all
    weights are one.

    Examples
    --------
    >>> import torch
    >>> from hvpop import LowRank
    >>> u = torch.tensor([[1.0], [2.0]])
    >>> LowRank(u).to_dense()
    tensor([[1., 2.],
            [2., 4.]])
    """

    _fresh = True

    def __init__(
        self,
        U: Tensor | NDArrayAny,
        s: Tensor | NDArrayAny | None = None,
        W: Tensor | NDArrayAny | None = None,
    ) -> None:
        self.U = _entries("LowRank", U, ndim=2)
        self.W = self.U if W is None else _entries("LowRank", W, ndim=2)
        rank = self.U.shape[1]
        self.s = self.U.new_ones(rank) if s is None else _entries("LowRank", s, ndim=1)
        if self.W.shape[1] != rank or self.s.shape[0] != rank:
            raise ValueError(
                "LowRank expects U (m, r), s (r,), W (n, r), got "
                f"{tuple(self.U.shape)}, {tuple(self.s.shape)}, {tuple(self.W.shape)}"
            )
        kinds = [(factor.dtype, factor.device) for factor in (self.U, self.s, self.W)]
        if kinds.count(kinds[0]) != 3:
            raise TypeError(
                "LowRank needs one dtype and device, got "
                + ", ".join(f"{name} {k[0]} {k[1]}" for name, k in zip("UsW", kinds, strict=True))
            )
        super().__init__(
            (self.U.shape[0], self.W.shape[0]),
            dtype=self.U.dtype,
            device=self.U.device,
            symmetric=W is None or W is U or torch.equal(self.U, self.W),
        )

    def _apply(self, V: Tensor) -> Tensor:
        return self.U.to(V.dtype) @ (self.s.to(V.dtype).unsqueeze(1) * (self.W.T.to(V.dtype) @ V))

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self.W.to(U.dtype) @ (self.s.to(U.dtype).unsqueeze(1) * (self.U.T.to(U.dtype) @ U))

    def _label(self) -> str:
        return f"LowRank({self.s.shape[0]})"


class FromFunction(LinearOperator):
    """Any linear function of columns: ``apply(V)`` maps ``(n, k)`` to ``(m, k)`` in torch.

    It must not write to ``V``, nor return a buffer that it will write to later.

    Examples
    --------
    >>> import torch
    >>> from hvpop import FromFunction
    >>> shift = FromFunction(lambda V: V.roll(1, 0), (3, 3), lambda U: U.roll(-1, 0))
    >>> shift.T @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    tensor([2., 3., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        apply_transpose: Callable[[Tensor], Tensor] | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        symmetric: bool = False,
    ) -> None:
        super().__init__(shape, dtype=dtype, device=device, symmetric=symmetric)
        self._function = apply
        self._transpose_function = apply_transpose

    def _apply(self, V: Tensor) -> Tensor:
        return self._checked(self._function(V), (self.shape[0], V.shape[1]))

    def _apply_transpose(self, U: Tensor) -> Tensor:
        if self._transpose_function is None:
            return super()._apply_transpose(U)
        return self._checked(self._transpose_function(U), (self.shape[1], U.shape[1]))

    def _checked(self, Y: Tensor, shape: tuple[int, int]) -> Tensor:
        got = tuple(Y.shape) if isinstance(Y, Tensor) else type(Y).__name__
        if got != shape:
            raise ValueError(f"{self!r}: its function must return a tensor {shape}, got {got}")
        return Y


def _entries(who: str, values: Tensor | NDArrayAny, ndim: int) -> Tensor:
    tensor = crossing.entries(who, values)
    if tensor.ndim != ndim:
        raise ValueError(f"{who} expects a {ndim}-d array, got shape {tuple(tensor.shape)}")
    return tensor
