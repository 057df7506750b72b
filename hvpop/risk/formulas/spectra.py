"""Singular values and eigenvalues, with second derivatives where some of them are equal.

The gradient of a function of the singular values of ``A = U diag(s) V'`` is ``U diag(c) V'``, where
``c`` are its derivatives by the values. How that changes with A has quotients ``(c_i - c_j) / (s_i - s_j)``,
which are rounding noise where values are equal, as at an orthogonal initialization. There the
derivative still exists if the function does not tell equal values apart: the vectors of equal ones
may be turned at will, and turned so that a change of A splits the values up without mixing the
vectors, there is no quotient any more (Kato 1976, II.2.3; Lewis and Sendov 2001).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .places import Place

Ord = int | float | str | None


def svdvals(A: Tensor, *, driver: str | None = None, out: Tensor | None = None) -> Tensor | None:
    return None if driver or out is not None else _values(A, symmetric=False)


def eigvalsh(A: Tensor, UPLO: str = "L", *, out: Tensor | None = None) -> Tensor | None:
    if UPLO.upper() not in ("L", "U") or out is not None:
        return None
    return _values(A if UPLO.upper() == "L" else A.mT, symmetric=True)


def matrix_norm(
    A: Tensor,
    ord: Ord = "fro",
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    if ord not in _NORMS or out is not None or dtype not in (None, A.dtype) or len(dim) != 2:
        return None
    if not all(-A.dim() <= d < A.dim() for d in dim) or dim[0] % A.dim() == dim[1] % A.dim():
        return None
    s = _values(A.movedim(tuple(dim), (-2, -1)), symmetric=False)
    if s is None:
        return None
    norm = _NORMS[ord](s)
    for d in sorted(d % A.dim() for d in dim) if keepdim else ():
        norm = norm.unsqueeze(d)
    return norm


def linalg_norm(
    A: Tensor, ord: Ord = None, dim: Any = None, keepdim: bool = False, **options: Any
) -> Tensor | None:
    if dim is None and A.dim() == 2:
        dim = (0, 1)
    pair = isinstance(dim, Sequence) and len(dim) == 2
    return matrix_norm(A, ord, dim, keepdim, **options) if pair and ord in _NORMS else None


def norm(
    input: Tensor,
    p: Ord = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    return linalg_norm(input, p, dim, keepdim, out=out, dtype=dtype) if p == "nuc" else None


def nuclear_norm(
    A: Tensor, dim: Any = (-2, -1), keepdim: bool = False, **options: Any
) -> Tensor | None:
    if isinstance(dim, bool):  # without dim the second argument is keepdim
        dim, keepdim = (-2, -1), dim
    torch.nuclear_norm(A.new_zeros(1, 1))  # warns, once
    return linalg_norm(A, "nuc", dim, keepdim, **options)


def cond(A: Tensor, p: Ord = None, *, out: Tensor | None = None) -> Tensor | None:
    s = _values(A, symmetric=False) if p in (None, 2, -2) and out is None else None
    if s is None:
        return None
    return s[..., -1] / s[..., 0] if p == -2 else s[..., 0] / s[..., -1]


def svd(A: Tensor, *args: Any, **options: Any) -> Any:
    return _with_values(torch.svd(A, *args, **options), 1, A, symmetric=False)


def linalg_svd(A: Tensor, *args: Any, **options: Any) -> Any:
    return _with_values(torch.linalg.svd(A, *args, **options), 1, A, symmetric=False)


def eigh(A: Tensor, UPLO: str = "L", **options: Any) -> Any:
    lower = A if UPLO.upper() == "L" else A.mT
    return _with_values(torch.linalg.eigh(A, UPLO, **options), 0, lower, symmetric=True)


_NORMS: dict[Ord, Callable[[Tensor], Tensor]] = {
    "nuc": lambda s: s.sum(-1),
    2: lambda s: s.amax(-1),
    -2: lambda s: s.amin(-1),
}


def _values(A: Tensor, symmetric: bool) -> Tensor | None:
    real = isinstance(A, Tensor) and A.is_floating_point() and A.requires_grad
    if not real or A.dim() < 2 or A.numel() == 0 or (symmetric and A.shape[-1] != A.shape[-2]):
        return None
    return values_of(A, symmetric, Place())[0]


def _with_values(decomposition: Any, place: int, A: Tensor, symmetric: bool) -> Any:
    """Torch's decomposition; where values are equal, these are ours."""
    values = decomposition[place]
    if values.requires_grad and values.numel() and groups_of(values.detach()) is not None:
        parts = list(decomposition)
        parts[place] = _values(A, symmetric)
        if parts[place] is not None:
            return type(decomposition)(parts)
    return decomposition


class Spectrum(NamedTuple):
    """``A = U diag(s) V'``; for symmetric matrices V is U, and ``s`` may have any sign."""

    U: Tensor
    s: Tensor
    V: Tensor

    def assembled(self, c: Tensor) -> Tensor:
        return (self.U * c[..., None, :]) @ self.V.mT

    def diagonal(self, E: Tensor) -> Tensor:
        """By how much the values change with A along E."""
        return ((self.U.mT @ E) * self.V.mT).sum(-1)

    def adapted(self, E: Tensor, groups: Tensor | None) -> Spectrum:
        """The same matrix by vectors that a change along E does not mix within groups of equal values."""
        if groups is None:
            return self
        X = self.U.mT @ E @ self.V
        X = (X + X.mT) / 2 * (groups[..., :, None] == groups[..., None, :])
        scale = X.abs().amax((-2, -1), keepdim=True)
        X = X / torch.where(scale > 0, scale, 1)
        # far apart, so that vectors of one group stay in it and groups in their order
        Q = torch.linalg.eigh(X + torch.diag_embed(3.0 * X.shape[-1] * groups.to(X))).eigenvectors
        U = self.U @ Q
        return Spectrum(U, self.s, U if self.V is self.U else self.V @ Q)

    def changed(self, c: Tensor, E: Tensor, groups: Tensor | None) -> Tensor:
        """The change along E of ``assembled(c)``, except that of ``c``."""
        U, s, V = self
        UE, EV = U.mT @ E, E @ V
        X = UE @ V
        even = (X + X.mT) / 2 * _quotients(s, c, groups)
        if V is U:
            return U @ even @ U.mT
        noise = _noise(s)
        odd = (X - X.mT) / 2 * _ratio(_sums(c), _sums(s), noise[..., None])
        change = U @ (even + odd) @ V.mT
        slope = _ratio(c, s, noise)[..., None, :]
        if U.shape[-2] > s.shape[-1]:
            change = change + ((EV - U @ X) * slope) @ V.mT
        if V.shape[-2] > s.shape[-1]:
            change = change + (U * slope) @ (UE - X @ V.mT)
        return change


def _sums(x: Tensor) -> Tensor:
    """``x_i + x_j``, without the diagonal, which nothing reads."""
    total = x[..., :, None] + x[..., None, :]
    return total.masked_fill(torch.eye(x.shape[-1], dtype=torch.bool, device=x.device), 1)


def _ratio(c: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """``c / s``, infinite where s is zero but for rounding and c is not: a kink at rank deficiency."""
    small = torch.finfo(s.dtype).eps ** 0.5 * c.abs().amax()
    return c / s.masked_fill((s <= noise) & (c.abs() > small), 0)


def _quotients(s: Tensor, c: Tensor, groups: Tensor | None) -> Tensor:
    """``(c_i - c_j) / (s_i - s_j)``, zero within groups; infinite where equal values are told apart."""
    below, above = (x[..., :, None] - x[..., None, :] for x in (s, c))
    same = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    if groups is not None:
        same = same | (groups[..., :, None] == groups[..., None, :])
        below = below.masked_fill(below.abs() <= _noise(s)[..., None], 0)
    return torch.where(same, 0, above / torch.where(same, 1, below))


def groups_of(s: Tensor, c: Tensor | None = None) -> Tensor | None:
    """Numbers of the groups of equal values, of those that are sorted; None if all differ.

    Equal up to the root of eps: closer than that quotients lose more digits than equality. Where
    derivatives by them, c, are given, equal values that these tell apart are not of one group.
    """
    close = torch.finfo(s.dtype).eps ** 0.5
    apart = s.diff(dim=-1).abs() > close * s[..., 1:].abs() + _noise(s)
    if apart.all():
        return None
    if c is not None:
        apart = apart | (c.diff(dim=-1).abs() > 10 * close * c.abs().amax(-1, keepdim=True))
    return F.pad(apart.cumsum(-1), (1, 0))


def _noise(s: Tensor) -> Tensor:
    """By how much rounding alone makes values differ."""
    return 10 * s.shape[-1] * torch.finfo(s.dtype).eps * s.abs().amax(-1, keepdim=True)


def _decomposed(A: Tensor, symmetric: bool) -> Spectrum:
    if symmetric:
        s, U = torch.linalg.eigh(A)
        return Spectrum(U, s, U)
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return Spectrum(U, s, Vh.mT)


class Values(Function):
    """The values of a spectrum, and its vectors as constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        A: Tensor, symmetric: bool, place: Place[Spectrum]
    ) -> tuple[Tensor, Tensor, Tensor]:
        U, s, V = _decomposed(A, symmetric)
        return s, U, V.clone() if symmetric else V

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        A, ctx.symmetric, ctx.place = inputs
        s, U, V = output
        ctx.mark_non_differentiable(U, V)
        ctx.save_for_backward(A, s, U, V)
        ctx.save_for_forward(A, s, U, V)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        if c is None:
            return None, None, None
        A, s, U, V = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradient(c, A, s, U, V, ctx.symmetric, ctx.place), None, None
        spectrum = ctx.place.taken() or _spectrum(s, U, V, ctx.symmetric)
        return spectrum.assembled(c), None, None

    @staticmethod
    def jvp(ctx: Any, E: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        _A, s, U, V = ctx.saved_tensors
        spectrum = _spectrum(s, U, V, ctx.symmetric)
        return spectrum.adapted(E, groups_of(s)).diagonal(E), None, None


class Gradient(Function):
    """``U diag(c) V'`` as a function of c and A."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        c: Tensor,
        A: Tensor,
        s: Tensor,
        U: Tensor,
        V: Tensor,
        symmetric: bool,
        place: Place[Spectrum],
    ) -> Tensor:
        return Spectrum(U, s, V).assembled(c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.symmetric, ctx.place = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, E: Tensor) -> tuple[Tensor | None, ...]:
        c, A, s, U, V = ctx.saved_tensors
        if torch.is_grad_enabled():  # once more, through the derivatives of torch
            spectrum, groups = _decomposed(A, ctx.symmetric), None
        else:
            spectrum, groups = _spectrum(s, U, V, ctx.symmetric), groups_of(s, c)
        by_A = spectrum.changed(c, E, groups)
        if groups is not None:
            spectrum = ctx.place.left = spectrum.adapted(E, groups)
        return spectrum.diagonal(E), by_A, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dc: Tensor | None, E: Tensor | None, *_: Any) -> Tensor | None:
        c, _A, s, U, V = ctx.saved_tensors
        spectrum = _spectrum(s, U, V, ctx.symmetric)
        change = None
        if E is not None:
            change = spectrum.changed(c, E, groups_of(s, c))
            spectrum = spectrum.adapted(E, groups_of(s))  # as where the values change
        if dc is None:
            return change
        by_c = spectrum.assembled(dc)
        return by_c if change is None else change + by_c


def _spectrum(s: Tensor, U: Tensor, V: Tensor, symmetric: bool) -> Spectrum:
    return Spectrum(U, s, U if symmetric else V)


values_of: Callable[[Tensor, bool, Place[Spectrum]], tuple[Tensor, ...]] = Values.apply
gradient: Callable[..., Tensor] = Gradient.apply
