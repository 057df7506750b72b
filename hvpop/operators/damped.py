"""Damping: an operator plus a positive diagonal, with one hook for a rule of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from . import crossing
from .algebra import Composite, require_operators
from .base import LinearOperator
from .crossing import NDArrayAny
from .forms import BatchForms
from .wording import nearest, some


class Damped(Composite):
    """``A + D`` for a square operator ``A`` and a diagonal damping ``D``.

    Parameters
    ----------
    A : LinearOperator
        Square. If it follows a live model, so does the damped operator.
    damping : float, Tensor, ndarray or mapping
        One number; one per entry, shape ``(n,)``; or numbers by parameter name, where a name may
        be a glob, the first match counts and parameters without a match are not damped (needs an
        ``A`` with a `layout`, such as a Hessian).

    Notes
    -----
    For a rule of your own override `damping`; ``D`` must be linear and symmetric.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Damped, Diagonal
    >>> A = Diagonal(torch.tensor([1.0, -2.0]))
    >>> Damped(A, 0.5) @ torch.ones(2)
    tensor([ 1.5000, -1.5000])
    >>> class SignAware(Damped):
    ...     def damping(self, V):
    ...         return 2 * self.operator.d.abs()[:, None] * V
    >>> SignAware(A) @ torch.ones(2)
    tensor([3., 2.])
    """

    _fresh = True

    def __init__(
        self, A: LinearOperator, damping: float | Tensor | NDArrayAny | Mapping[str, float] = 0.0
    ) -> None:
        require_operators(type(self).__name__, (A,))
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"{type(self).__name__} expects a square operator, got {A!r}")
        super().__init__((A,), A.shape, symmetric=A.symmetric)
        self._damping = _column(A, damping)

    @property
    def operator(self) -> LinearOperator:
        """The operator without its damping."""
        return self.parts[0]

    def damping(self, V: Tensor) -> Tensor:
        """``D V`` for columns ``(n, k)``; override for a rule of your own."""
        return self._damping.to(V.dtype) * V

    _by_parts = True

    def _apply(self, V: Tensor) -> Tensor:
        return self._added(self.operator._apply(V), V)

    def _apply_transpose(self, U: Tensor) -> Tensor:
        return self._added(self.operator._apply_transpose(U), U)

    def _added(self, Y: Tensor, V: Tensor) -> Tensor:
        """``Y + D V``; without a block for ``D V`` where the rule is the usual one."""
        if type(self).damping is not Damped.damping:
            return Y + self.damping(V)
        D = self._damping.to(V.dtype)
        own = self.operator._gives_fresh() and crossing.writable(Y, V) and Y.dtype is V.dtype
        return torch.addcmul(Y.detach(), D, V, out=Y.detach() if own else None)

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms | None:
        forms = self.operator._batch_forms(V, batches)
        return forms and forms.shifted(self.space.dots(V, self.damping(V).expand_as(V)))


def _column(
    A: LinearOperator, damping: float | Tensor | NDArrayAny | Mapping[str, float]
) -> Tensor:
    """The damping as something that multiplies columns: ``(n, 1)``, or 0-dim if uniform."""
    n = A.shape[0]
    if isinstance(damping, Mapping):
        damping = _by_name(A, damping)
    value = crossing.entries(f"Damped({A!r})", damping)
    value = value.to(A.device, crossing.working_dtype(A.torch_dtype), copy=True)
    if not bool(value.isfinite().all()):
        raise ValueError(f"Damped({A!r}): expected finite numbers, got {damping!r:.60}")
    if value.ndim == 0:
        return value
    if tuple(value.shape) != (n,):
        raise ValueError(
            f"Damped({A!r}): expected a number, shape ({n},) or a mapping of parameter names, "
            f"got shape {tuple(value.shape)}"
        )
    return value.unsqueeze(1)


def _by_name(A: LinearOperator, damping: Mapping[str, float]) -> Tensor:
    layout = A.layout
    if layout is None:
        raise TypeError(
            f"{A!r} has no named parameters; give its damping by entry, shape ({A.shape[0]},)"
        )
    unknown = [p for p in damping if not any(fnmatchcase(name, p) for name in layout.names)]
    if unknown:
        raise ValueError(
            f"Damped({A!r}): no parameter matches {some(unknown)}; {nearest(unknown[0], layout.names)}"
        )
    numbers = {pattern: _number(A, pattern, value) for pattern, value in damping.items()}
    entries = torch.zeros(layout.size, device=A.device, dtype=torch.float64)
    for name, place in layout.slices():
        matches = (value for pattern, value in numbers.items() if fnmatchcase(name, pattern))
        entries[place] = next(matches, 0.0)
    return entries


def _number(A: LinearOperator, pattern: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"Damped({A!r}): expected one number for {pattern!r}, got {type(value).__name__}; "
            "numbers by entry go together in one vector, layout.flatten(...)"
        ) from None
