"""What +, -, *, @, **, .T and .H build: operators made of operators, computed in torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor

from . import crossing
from .base import LinearOperator, Memory
from .basic import Identity
from .forms import BatchForms


class Composite(LinearOperator):
    """An operator made of others, its ``parts``.

    Linearizing one copies it and replaces its parts, so attributes of a user's subclass survive.
    """

    parts: tuple[LinearOperator, ...]

    def __init__(
        self, parts: tuple[LinearOperator, ...], shape: tuple[int, int], *, symmetric: bool
    ) -> None:
        first = parts[0]
        for part in parts[1:]:
            if part.torch_dtype is not first.torch_dtype or part.device != first.device:
                raise TypeError(
                    f"{type(self).__name__} needs one dtype and device, got {first!r} and "
                    f"{part!r}; build both on the same model, or use Identity.like(A)"
                )
        super().__init__(shape, dtype=first.torch_dtype, device=first.device, symmetric=symmetric)
        self.parts = parts

    def _children(self) -> tuple[LinearOperator, ...]:
        return self.parts

    def _linearized(self, memory: Memory, done: dict[int, LinearOperator]) -> LinearOperator:
        if id(self) not in done:
            done[id(self)] = self._with_parts(
                tuple(part._linearized(memory, done) for part in self.parts)
            )
        return done[id(self)]

    def _with_parts(self, parts: tuple[LinearOperator, ...]) -> Self:
        if all(new is old for new, old in zip(parts, self.parts, strict=True)):
            return self
        rebuilt = copy.copy(self)
        rebuilt.parts = parts
        return rebuilt


class Sum(Composite):
    """``A + B + ...``."""

    _fresh = True

    def __init__(self, *terms: LinearOperator) -> None:
        terms = tuple(t for term in terms for t in (term.parts if type(term) is Sum else (term,)))
        for term in terms[1:]:
            if term.shape != terms[0].shape:
                raise ValueError(f"a sum needs equal shapes, got {terms[0]!r} and {term!r}")
        super().__init__(terms, terms[0].shape, symmetric=all(t.symmetric for t in terms))

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return self._gathered([(part, part._apply) for part in self.parts], V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self._gathered([(part, part._apply_transpose) for part in self.parts], U)

    def _gathered(
        self, hooks: list[tuple[LinearOperator, Callable[[Tensor], Tensor]]], V: Tensor
    ) -> Tensor:
        """The sum of what the hooks of the parts make of ``V``, in the memory of the first."""
        (first, hook), *others = hooks
        Y = hook(V)
        own = first._gives_fresh() and crossing.writable(Y, V)
        for part, hook in others:
            Y, own = _plus(Y.detach(), part, hook, V, own), True
        return Y

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms | None:
        of_data = [part for part in self.parts if part._averages_data()]
        if len(of_data) > 1:
            raise ValueError(
                f"{self!r}: {len(of_data)} of its terms have data in them, and which batch of one "
                "belongs to which of another is not known; expected one such term: take the forms "
                f"of each, or the Hessian of the sum of their losses; got {of_data}"
            )
        forms = of_data[0]._batch_forms(V, batches) if of_data else None
        if forms is None:
            return None
        others = (part for part in self.parts if part is not of_data[0])
        return reduce(BatchForms.shifted, (self.space.dots(V, B._apply(V)) for B in others), forms)


class Product(Composite):
    """``A @ B @ ...``; symmetric if it reads the same from both ends, as ``P @ H @ P`` does."""

    def __init__(self, *factors: LinearOperator) -> None:
        factors = tuple(
            f
            for factor in factors
            for f in (factor.parts if type(factor) is Product else (factor,))
        )
        for left, right in pairwise(factors):
            if left.shape[1] != right.shape[0]:
                raise ValueError(f"a product needs matching shapes, got {left!r} @ {right!r}")
        mirrored = all(_are_transposes(a, b) for a, b in zip(factors, factors[::-1], strict=True))
        super().__init__(factors, (factors[0].shape[0], factors[-1].shape[1]), symmetric=mirrored)

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return reduce(lambda W, part: part._apply(W), reversed(self.parts), V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return reduce(lambda W, part: part._apply_transpose(W), self.parts, U)

    def _transpose(self) -> LinearOperator:  # so that A.T @ A is seen to be symmetric
        return self if self.symmetric else Product(*(part.T for part in reversed(self.parts)))


class Scaled(Composite):
    """``c * A``."""

    _fresh = True

    def __init__(self, scale: float, A: LinearOperator) -> None:
        super().__init__((A,), A.shape, symmetric=A.symmetric)
        self.scale = scale

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return self.scale * self.parts[0]._apply(V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self.scale * self.parts[0]._apply_transpose(U)

    def _transpose(self) -> LinearOperator:
        return self if self.symmetric else Scaled(self.scale, self.parts[0].T)

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms | None:
        forms = self.parts[0]._batch_forms(V, batches)
        return forms and forms.scaled(self.scale)

    def _label(self) -> str:
        return f"Scaled({self.scale:g})"


class Power(Composite):
    """``A ** p`` for a non-negative integer p."""

    def __init__(self, A: LinearOperator, power: Any) -> None:
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"only a square operator has powers, got {A!r}")
        if isinstance(power, bool) or not isinstance(power, Integral) or int(power) < 0:
            raise ValueError(f"{A!r} ** {power!r}: expected a non-negative integer")
        super().__init__((A,), A.shape, symmetric=A.symmetric)
        self.power = int(power)

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return reduce(lambda W, _: self.parts[0]._apply(W), range(self.power), V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return reduce(lambda W, _: self.parts[0]._apply_transpose(W), range(self.power), U)

    def _label(self) -> str:
        return f"Power({self.power})"


class Transposed(Composite):
    """``A.T``, for an operator that is not symmetric."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__((A,), (A.shape[1], A.shape[0]), symmetric=A.symmetric)

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return self.parts[0]._apply_transpose(V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self.parts[0]._apply(U)

    def _transpose(self) -> LinearOperator:
        return self.parts[0]


def require_operators(who: str, parts: tuple[LinearOperator, ...]) -> None:
    """Refuse what is not of hvpop among the parts of something that a user builds by name."""
    for part in parts:
        if not isinstance(part, LinearOperator):
            raise TypeError(
                f"{who} expects operators of hvpop, got {type(part).__name__}; wrap a matrix in "
                "hvpop.Dense(matrix), products in hvpop.FromFunction"
            )


def times(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """``A @ B`` with scalars in front, so that ``c * A @ A`` is seen to be symmetric."""
    scale = 1.0
    factors = []
    for factor in (A, B):
        if type(factor) is Scaled:
            scale *= factor.scale
            factor = factor.parts[0]
        factors.append(factor)
    product = Product(*factors)
    return product if A is factors[0] and B is factors[1] else Scaled(scale, product)


def _plus(
    Y: Tensor, part: LinearOperator, hook: Callable[[Tensor], Tensor], V: Tensor, own: bool
) -> Tensor:
    """``Y + hook(V)``, in ``Y`` if that is one's own; without a block for a multiple of the identity."""
    if type(part) is Scaled and type(part.parts[0]) is Identity:
        return torch.add(Y, V, alpha=part.scale, out=Y if own and Y.dtype is V.dtype else None)
    product = hook(V).detach()
    return torch.add(Y, product, out=Y if own and Y.dtype is product.dtype else None)


def _are_transposes(A: LinearOperator, B: LinearOperator) -> bool:
    if A is B:
        return A.symmetric
    return (type(A) is Transposed and A.parts[0] is B) or (
        type(B) is Transposed and B.parts[0] is A
    )
