"""What every solver demands of its arguments, said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, Space, arguments
from ..operators.crossing import into, working_dtype
from ..operators.space import powers
from .results import Callback, Step


def columns(
    who: str, A: LinearOperator, b: Any, name: str = "b", *, length: int | None = None
) -> Tensor:
    """``b``, a tensor ``(m,)`` or ``(m, k)``, as columns ``(m, k)`` in the working dtype of ``A``."""
    m = A.held[0] if length is None else length
    if not isinstance(b, Tensor):
        raise TypeError(
            f"{who} expects {name} as a torch tensor, got {type(b).__name__}; use torch.as_tensor"
            f"({name})" + (", or Inverse(A) @ b, which takes arrays" if name == "b" else "")
        )
    if b.ndim not in (1, 2) or b.shape[0] != m:
        raise ValueError(
            f"{who}({A!r}) expects {name} of shape ({m},) or ({m}, k), got {tuple(b.shape)}"
        )
    dtype = working_dtype(A.torch_dtype)
    if b.dtype not in (A.torch_dtype, dtype):
        raise TypeError(
            f"{who}({A!r}) expects {name} of dtype {dtype}, got {b.dtype}; {into(name, b, str(dtype))}"
        )
    if b.device != A.device:
        raise ValueError(
            f"{who}({A!r}) expects {name} on {A.device}, got {b.device}; use .to(A.device)"
        )
    if not A.space.sized(m).finite(b):
        raise ValueError(f"{who}({A!r}): {name} has entries that are not finite")
    B = b.detach().to(dtype)
    return B if B.ndim == 2 else B.unsqueeze(1)


def start(who: str, A: LinearOperator, b: Tensor, x0: Any) -> Tensor | None:
    """A private copy of ``x0`` as columns, or None."""
    if x0 is None:
        return None
    X = columns(who, A, x0, "x0", length=A.held[1])
    if tuple(x0.shape[1:]) != tuple(b.shape[1:]):
        raise ValueError(
            f"{who}({A!r}) expects one x0 per column of b, got shapes {tuple(x0.shape)} and {tuple(b.shape)}"
        )
    return X.clone()


def symmetric(who: str, A: Any, instead: str = "use lsmr") -> None:
    """``A`` is a symmetric operator."""
    arguments.symmetric(who, A, instead)


def preconditioner(who: str, A: LinearOperator, M: Any) -> LinearOperator | None:
    """``M`` is a symmetric operator that multiplies what ``A`` multiplies; linearized."""
    if M is None:
        return None
    arguments.operator(f"{who}'s preconditioner", M)
    if M.shape != A.shape:
        raise ValueError(f"{who}({A!r}) expects a preconditioner of shape {A.shape}, got {M!r}")
    if M.device != A.device or working_dtype(M.torch_dtype) is not working_dtype(A.torch_dtype):
        raise TypeError(
            f"{who}({A!r}) expects a preconditioner of dtype {working_dtype(A.torch_dtype)} on {A.device}, got {M!r}"
        )
    symmetric(f"{who}'s preconditioner", M, "symmetrize it")
    linearized: LinearOperator = M.linearize()
    return linearized


def positive_form(who: str, A: LinearOperator, M: LinearOperator, R: Tensor, forms: Tensor) -> None:
    """``r'Mr``, the ``forms`` of residuals ``R``, are positive: a preconditioner has no null space."""
    if bool((forms > 0).all()):
        return
    small = torch.finfo(R.dtype).tiny ** 0.25  # whose squares may underflow
    null = (forms == 0) & (A.space.sized(R.shape[0]).largest(R) > small)
    if bool((forms < 0).any()) or bool(null.any()):
        sign = (
            "r'Mr < 0" if bool((forms < 0).any()) else "r'Mr = 0 for a residual r that is not zero"
        )
        raise ValueError(
            f"{who}({A!r}): its preconditioner {M!r} is not positive definite; it has {sign}. "
            "Damp it: M + c * Identity.like(M)"
        )


def sizes(V: Tensor, space: Space | None = None) -> Tensor:
    """A power of two near the largest entry of each column, ``(k,)``."""
    return powers((space or Space.of(V)).largest(V))


def norms(V: Tensor, space: Space | None = None) -> Tensor:
    """The Euclidean norms of the columns, also where squares of entries over- or underflow."""
    return (space or Space.of(V)).norms(V).to(V.dtype)


def limits(who: str, rtol: float, atol: float, max_steps: int | None) -> None:
    """Tolerances are not negative, steps are counted from 0."""
    arguments.not_negative(who, rtol=rtol, atol=atol)
    arguments.counts(who, least=0, max_steps=max_steps)


def callback(who: str, function: Any) -> None:
    """What is to be called after each step can be called."""
    if function is not None and not callable(function):
        raise TypeError(f"{who} expects callback as a function of a Step, got {function!r:.60}")


def stopped(who: str, function: Callback | None, step: Callable[[], Step]) -> bool:
    """Whether the callback ends the run; one that takes a `Step` for an array is told what it got."""
    if function is None:
        return False
    try:
        return bool(function(step()))
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"{who}: its callback {function!r:.60} failed: {error}. It gets one argument, a Step with "
            "number, x, residual_norms and products; one written for SciPy, which gets the iterate as "
            "an array, is lambda step: callback(step.x.cpu().numpy())"
        ) from error
