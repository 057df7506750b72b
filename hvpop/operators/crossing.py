"""Where NumPy meets torch, and only here: operands are checked, results go back in kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, ValuesView
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from .base import LinearOperator
    from .forms import BatchForms

NDArrayAny = NDArray[Any]

_MANY_PAGES = 1 << 20  # numbers
_NUMPY_OF = {torch.float64: np.float64, torch.float32: np.float32}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products are computed and accumulated in: float32 for half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The NumPy dtype that SciPy reads for an operator of this torch dtype."""
    try:
        return np.dtype(_NUMPY_OF[working_dtype(dtype)])
    except KeyError:
        raise TypeError(
            "an operator is real floating point (float64, float32, bfloat16, float16), got "
            f"{dtype}; view complex parameters as real ones first (torch.view_as_real)"
        ) from None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is not set; NumPy asks the system for large pages, which cost a fraction to touch first."""
    size = math.prod(shape)
    if device.type != "cpu" or dtype not in _NUMPY_OF or size < _MANY_PAGES:
        return torch.empty(shape, dtype=dtype, device=device)
    line = 64  # bytes: where it begins decides in which order BLAS adds up
    array = np.empty(size + line, _NUMPY_OF[dtype])
    start = -array.ctypes.data % line // array.itemsize
    return torch.from_numpy(array[start : start + size].reshape(shape))


def entries(who: str, values: Any) -> Tensor:
    """What a user gave as matrix, diagonal or damping, as a real floating point tensor.

    Memory is shared where torch can share it; integers become float64.
    """
    if not isinstance(values, Tensor):
        array = _numbers(who, values, kinds="biuf")
        kept = array.dtype.type in (np.float32, np.float16)
        return _from_numpy(array, array.dtype.type if kept else np.float64)
    if values.is_complex():
        raise TypeError(f"{who} expects real numbers, got a tensor of dtype {values.dtype}")
    tensor = values.detach()
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def multiply(
    A: LinearOperator,
    hook: Callable[[Tensor], Tensor],
    x: Any,
    shape: tuple[int, int],
    *,
    columns: bool,
) -> Any:
    """``hook`` applied to an operand: the checked public face over a trusted hook.

    ``shape`` is that of the matrix behind the hook; ``columns`` says whether ``x`` must be a block
    ``(n, k)`` or may be a vector ``(n,)`` or ``(n, 1)``. A tensor gives a tensor, anything else an
    ndarray.
    """
    m, n = shape
    if isinstance(x, Tensor):
        _check_shape(A, tuple(x.shape), n, columns)
        _check_kind(A, x)
        return _rounded(A, _product(A, hook, m, x.detach()), x.dtype).reshape(m, *x.shape[1:])
    array = _numbers(A, x, kinds="biufc")
    _check_shape(A, array.shape, n, columns)

    def product(part: NDArrayAny) -> NDArrayAny:
        Y = _product(A, hook, m, _from_numpy(part, A.dtype))
        return Y.cpu().numpy().reshape(m, *array.shape[1:])

    if array.dtype.kind == "c":  # A is real and linear: its parts are two real columns
        return product(array.real) + 1j * product(array.imag)
    return product(array)


def forms(
    A: LinearOperator, hook: Callable[[Tensor], BatchForms | None], x: Any
) -> BatchForms | None:
    """``hook`` applied to a block ``(n, k)``, checked as for a product; nothing to convert back."""
    n = A.held[1]
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"v' A v expects a square operator, got {A!r}")
    if isinstance(x, Tensor):
        _check_shape(A, tuple(x.shape), n, columns=True)
        _check_kind(A, x)
        V = x.detach()
    else:
        array = _numbers(A, x, kinds="biuf")
        _check_shape(A, array.shape, n, columns=True)
        V = _from_numpy(array, A.dtype)
    if V.shape[1] == 0:
        raise ValueError(f"{A!r} expects shape ({n}, k) with k > 0, got {tuple(V.shape)}")
    with _full_precision(A.device):
        found = hook(V.to(A.device, working_dtype(A.torch_dtype)))
    if found is not None and tuple(found.values.shape) != (len(found.weights), V.shape[1]):
        expected, got = (len(found.weights), V.shape[1]), tuple(found.values.shape)
        raise ValueError(f"{A!r}: the forms of its batches must have shape {expected}, got {got}")
    return found


def _product(A: LinearOperator, hook: Callable[[Tensor], Tensor], m: int, x: Tensor) -> Tensor:
    """``hook`` of the columns of ``x``: no graph attached, in memory that is not that of ``x``."""
    working = working_dtype(A.torch_dtype)
    V = x if x.ndim == 2 else x.unsqueeze(1)
    if V.shape[1] == 0:  # spares every hook a case that only the crossing meets
        return torch.zeros(m, 0, dtype=working, device=A.device)
    with _full_precision(A.device):
        Y = hook(V.to(A.device, working))
    got = tuple(Y.shape) if isinstance(Y, Tensor) else type(Y).__name__
    if got != (m, V.shape[1]):
        expected = (m, V.shape[1])
        raise ValueError(f"{A!r}: its product must have shape {expected}, got {got}")
    Y = Y.detach().to(working)
    # a block whose columns are contiguous is answered in kind: a transpose costs what a cheap product does
    dense = Y.is_contiguous() or (Y.T.is_contiguous() and not x.is_contiguous())
    if not dense:
        return Y.clone(memory_format=torch.contiguous_format)
    shared = Y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return Y.clone() if shared else Y


def writable(Y: Tensor, V: Tensor) -> bool:
    """Whether the product ``Y`` of ``V`` is a block of its own, which a sum may be gathered in."""
    plain = Y.is_contiguous() or Y.T.is_contiguous()
    return plain and Y.untyped_storage().data_ptr() != V.untyped_storage().data_ptr()


def _rounded(A: LinearOperator, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in the dtype of the vector, unless that ends before it."""
    rounded = Y.to(dtype)
    if rounded is not Y and not rounded.isfinite().all() and Y.isfinite().all():
        raise OverflowError(
            f"{A!r}: the product reaches {Y.abs().max().item():.3g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:g}; multiply a float32 vector, A @ x.float()"
        )
    return rounded


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off: it would silently round the products to half precision."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def refuse_pieces(who: object, values: Any) -> None:
    """Refuse tensors by name or in a list, such as gradients, in place of one array."""
    pieces = values.values() if isinstance(values, Mapping) else values
    if isinstance(pieces, list | tuple | ValuesView) and any(
        isinstance(piece, Tensor) and piece.ndim for piece in pieces
    ):
        raise TypeError(
            f"{_named(who)} expects one array, got a {type(values).__name__} of {len(pieces)} tensors; those "
            "of named parameters become one vector with layout.flatten(...) of their operator"
        )


def _named(who: object) -> str:
    return who if isinstance(who, str) else repr(who)  # not made before it is asked for


def _numbers(who: object, values: Any, kinds: str) -> NDArrayAny:
    refuse_pieces(who, values)
    if hasattr(values, "toarray"):
        got = type(values).__name__
        raise TypeError(f"{_named(who)} expects a dense array, got {got}; use its .toarray()")
    array = np.asarray(values)
    if array.dtype.kind not in kinds:
        raise TypeError(
            f"{_named(who)} expects real numbers, got {values!r:.80} (dtype {array.dtype}); give a "
            "tensor, or an array of floats, such as numpy.asarray(x, dtype=float)"
        )
    return array


def _from_numpy(array: NDArrayAny, dtype: Any) -> Tensor:
    """The array as a tensor, copied only where torch cannot look at its memory."""
    if array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous:
        return _from_numpy(array.T, dtype).T
    array = np.require(array, dtype, ["C", "A"])
    # NumPy calls an axis of one entry contiguous whatever its stride; torch looks at the stride.
    plain = all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
    return torch.from_numpy(array if plain and array.flags.writeable else array.copy())


def _check_kind(A: LinearOperator, x: Tensor) -> None:
    if x.dtype is not A.torch_dtype and x.dtype is not working_dtype(A.torch_dtype):
        raise TypeError(
            f"{A!r} expects dtype {A.torch_dtype}, got {x.dtype}; {into('x', x, 'A.torch_dtype')}"
        )
    if x.device != A.device:
        raise ValueError(f"{A!r} expects device {A.device}, got {x.device}; use x.to(A.device)")
    if x.layout is not torch.strided:
        raise TypeError(f"{A!r} expects a dense tensor, got {x.layout}; use x.to_dense()")


def into(name: str, x: Tensor, dtype: str) -> str:
    """How a tensor of another dtype is to be given, in words; a complex one would lose its half."""
    if x.is_complex():
        return f"{name} has two real columns, torch.view_as_real({name}).to({dtype})"
    return f"use {name}.to({dtype})"


def _check_shape(A: LinearOperator, shape: tuple[int, ...], n: int, columns: bool) -> None:
    if columns:
        if len(shape) != 2 or shape[0] != n:
            raise ValueError(f"{A!r} expects shape ({n}, k), got {shape}")
    elif shape not in ((n,), (n, 1)):
        raise ValueError(f"{A!r} expects shape ({n},), got {shape}")
