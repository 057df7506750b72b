"""Everything that sums over the n entries of vectors: in float64, without a copy of them, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import crossing


class Space:
    """Vectors of ``n`` real numbers: inner products that hold at any n, bases, random vectors.

    ``k`` vectors are the columns of a tensor ``(n, k)``. All methods take any strides; those of
    ``rows.T`` for contiguous ``rows`` ``(k, n)``, which this class makes itself, are the fast ones.
    The plain float32 ``X.T @ X`` is wrong in the fourth digit at a million entries, and by a third at
    a hundred million. Here chunks are summed by themselves, and what they come to in float64, however
    long the vectors are. Within a chunk it is float64, too, for short vectors and for blocks;
    for long ones it is float32: wrong by some 1e-9 of ``sum_i |x_i y_i|``, and by up to 1e-5 where
    all numbers are the same and round the same way.

    All that reduces over n in `hvpop.solvers` and `hvpop.spectrum` goes through a space, so that
    vectors held in parts by several processes need another space and nothing else.

    Parameters
    ----------
    n : int
        How long vectors are.
    dtype : torch.dtype
        float32 or float64, of the vectors.
    device : torch.device
        Of the vectors, and of what is summed.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Identity
    >>> space = Identity(3_000_000, dtype=torch.float32).space
    >>> x = torch.full((3_000_000, 1), 0.1)
    >>> abs(space.norms(x).item() ** 2 / 30_000 - 1) < 1e-4
    True
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.dtype, self.device = n, dtype, device
        self.order = n  # of whole vectors, where ``n`` are of a part held here
        # numbers in float64 at a time: what the second-level cache of one core holds, or many threads need
        self._chunk = 1 << 16 if device.type == "cpu" else 1 << 24

    shared = False
    """Whether vectors are held in parts by several processes."""

    def sized(self, n: int) -> Space:
        """That of vectors with ``n`` entries here, held in the same way."""
        return self if n == self.n else Space(n, self.dtype, self.device)

    @staticmethod
    def of(V: Tensor) -> Space:
        """That of vectors held whole, ``(n,)`` or ``(n, k)``."""
        return Space(V.shape[0], V.dtype, V.device)

    # -- vectors ----------------------------------------------------------------------------------

    def empty(self, count: int) -> Tensor:
        """``(n, count)``, not set."""
        return crossing.empty((count, self.n), self.dtype, self.device).T

    def zeros(self, count: int) -> Tensor:
        """``(n, count)``."""
        return self.empty(count).zero_()

    def random(self, fill: Callable[[Tensor], object], count: int, skip: int = 0) -> Tensor:
        """``(n, count)``, each column filled in turn, after ``skip`` that are drawn and forgotten.

        One by one: how many are drawn at once changes none of them.
        """
        V = self.empty(count)
        for i in range(-skip, count):
            fill(V[:, max(i, 0)])
        return V

    def own(self, V: Tensor) -> Tensor:
        """The part of whole vectors ``(N, k)`` that is held here, ``(n, k)``: all of it."""
        return V

    def whole(self, V: Tensor) -> Tensor:
        """Whole vectors ``(N, k)`` from the parts of them that are held here and elsewhere."""
        return V

    def rows(self, V: Tensor, start: int, stop: int) -> Tensor:
        """Some rows of `whole`, on all processes."""
        return V[start:stop]

    def put(self, V: Tensor, start: int, rows: Tensor) -> None:
        """Set those of some rows of whole vectors that are held here, in ``V``."""
        V[start : start + len(rows)] = rows

    # -- what processes say, where vectors are held by several -------------------------------------

    leads = True
    """Whether this process is the one that writes files."""

    def told(self, thing: Any = None) -> Any:
        """What the process that leads says, on all of them."""
        return thing

    def given(self, v: Tensor) -> Tensor:
        """The tensor of the process that leads, in the memory of ``v``, on all of them."""
        return v

    # -- sums -------------------------------------------------------------------------------------

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """``X' Y``, ``(j, k)``, float64."""
        self._require_own(X, Y)
        if X.dtype is torch.float64:
            return X.T @ Y
        if X.shape[1] == 1:
            X, Y = Y, X
            return self.inner(X, Y).T if X.shape[1] > 1 else self.dots(X, Y)[None]
        if Y.shape[1] == 1 and self._is_long(X.shape[1] + 1):
            total = self._products(X, Y)
            if _in_range(total):
                return total
        same = X is Y
        total = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64, device=X.device)
        wide = _Wide()
        for part in self._parts(X.shape[1] + (0 if same else Y.shape[1])):
            x = wide(0, X[part])
            total.addmm_(x.T, x if same else wide(1, Y[part]))
        return total

    def _products(self, X: Tensor, y: Tensor) -> Tensor:
        """``X' y`` for one ``y`` ``(n, 1)``, chunks in float32."""
        pieces = zip(X.T.split(_SHORT // 8, 1), y[:, 0].split(_SHORT // 8), strict=True)
        return torch.stack([torch.mv(x, y_) for x, y_ in pieces]).double().sum(0)[:, None]

    def dots(self, X: Tensor, Y: Tensor) -> Tensor:
        """``x' y`` for each pair of columns, ``(k,)``, float64."""
        return self.together((X, Y))[0]

    def together(
        self, *pairs: tuple[Tensor, Tensor], first: Callable[[slice], object] | None = None
    ) -> list[Tensor]:
        """`dots` of several pairs of as many columns each, in one pass over the vectors.

        ``first`` is called with each slice of the n entries before its sums are taken: a place to
        update vectors in, piece by piece, that are then read while they are still in the cache.
        """
        self._require_own(*(V for pair in pairs for V in pair))
        # short columns, however many: one by one they cost more than a copy in float64
        narrow = self.dtype is torch.float32 and self.n > _SHORT // 4
        if narrow and self._is_long(pairs[0][0].shape[1]):
            totals = self._short_dots(pairs, first)
            if all(map(_in_range, totals)):
                return totals
            first = None  # done
        return self._wide_dots(pairs, first)

    def _short_dots(
        self, pairs: tuple[tuple[Tensor, Tensor], ...], first: Callable[[slice], object] | None
    ) -> list[Tensor]:
        """`together`, chunks in float32."""
        k = pairs[0][0].shape[1]
        columns = [
            (x[:, i].split(_SHORT), y[:, i].split(_SHORT)) for x, y in pairs for i in range(k)
        ]
        sums = []
        for i in range(math.ceil(self.n / _SHORT)):
            if first is not None:
                first(slice(i * _SHORT, (i + 1) * _SHORT))
            sums += [torch.dot(x[i], y[i]) for x, y in columns]
        return list(torch.stack(sums).double().reshape(-1, len(pairs), k).sum(0))

    def _wide_dots(
        self, pairs: tuple[tuple[Tensor, Tensor], ...], first: Callable[[slice], object] | None
    ) -> list[Tensor]:
        """`together`, all of it in float64."""
        k = pairs[0][0].shape[1]
        distinct = len({id(V) for pair in pairs for V in pair})
        wide, sums = _Wide(), []
        for part in self._parts(k * distinct):
            if first is not None:
                first(part)
            pieces = {id(V): wide(id(V), V[part]) for pair in pairs for V in pair}
            products = ((pieces[id(x)], pieces[id(y)]) for x, y in pairs)
            sums += [torch.mul(x, y, out=wide.room(0, x)).sum(0) for x, y in products]
        parts = len(sums) // len(pairs)
        return list(torch.stack(sums).reshape(parts, len(pairs), k).sum(0))

    def norms(self, X: Tensor) -> Tensor:
        """The Euclidean norms of the columns, ``(k,)``, float64; no square over- or underflows."""
        squares = self.dots(X, X)
        if X.dtype is torch.float64 and not bool(((squares > 1e-200) & (squares < 1e200)).all()):
            size = powers(self.largest(X))
            X = X / size
            return size * self.dots(X, X).sqrt()
        return squares.sqrt()

    def largest(self, X: Tensor) -> Tensor:
        """The largest magnitude of an entry of each column, ``(k,)``, in the dtype of ``X``."""
        if X.shape[0] == 0 or X.shape[1] == 0:
            return X.new_zeros(X.shape[1])
        low, high = torch.aminmax(X, dim=0) if X.shape[1] > 1 else torch.aminmax(X)
        return torch.maximum(-low, high).reshape(-1)

    def every(self, condition: Tensor) -> bool:
        """Whether a condition holds for all entries."""
        return bool(condition.all())

    def finite(self, X: Tensor) -> bool:
        """Whether all entries are finite."""
        # what is not finite makes the sum so, which is read faster than every entry
        return bool(X.sum().isfinite()) or self.every(X.isfinite())

    # -- bases ------------------------------------------------------------------------------------

    def qr(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """``X = Q R`` with orthonormal ``Q`` ``(n, k)`` and upper triangular ``R``, float64, diagonal >= 0.

        Columns that depend on others get a direction of their own in ``Q``.
        """
        if X.shape[1] == 0:
            return X, torch.zeros(0, 0, dtype=torch.float64, device=X.device)
        if X.dtype is torch.float64 or self.n <= max(X.shape[1], 64):
            Q, R = torch.linalg.qr(X.double())
        else:
            R = self._cholesky(self.inner(X, X))
            if R is not None:
                inverse = torch.linalg.solve_triangular(R, torch.eye(len(R)).to(R), upper=True)
                return self._times(X, [inverse]), R
            Q, R = self._by_chunks(X)
        signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
        return (Q * signs).to(X.dtype), signs[:, None] * R

    def _cholesky(self, G: Tensor) -> Tensor | None:
        """The factor of a Gram matrix; None where it has lost more digits than float32 lacks."""
        size = G.diagonal().sqrt()
        if not bool((size > 0).all()) or not bool(size.isfinite().all()):
            return None
        L, failed = torch.linalg.cholesky_ex(G / size / size[:, None])
        if int(failed) or float(L.diagonal().min()) < 1e-3:
            return None
        R: Tensor = L.T * size
        return R

    def _by_chunks(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """By orthonormal bases of chunks, then of what they have in common (Demmel et al., 2012)."""
        k = X.shape[1]
        Q, factors = self.empty(k), []
        for part in self._parts(k, least=k):
            Q[part], R = torch.linalg.qr(X[part].double())
            factors.append(R)
        S, R = torch.linalg.qr(torch.cat(factors))
        return self._times(Q, list(S.split(k)), least=k), R

    def _times(self, X: Tensor, factors: list[Tensor], least: int = 1) -> Tensor:
        """``X M``, chunk by chunk in float64, with one ``M`` for all or one for each."""
        Y = self.empty(factors[0].shape[1])
        for i, part in enumerate(self._parts(X.shape[1], least)):
            Y[part] = X[part].double() @ factors[i if len(factors) > 1 else 0]
        return Y

    def _require_own(self, *vectors: Tensor) -> None:
        for V in vectors:
            if V.shape[0] != self.n:
                raise ValueError(
                    f"a space of {self.n} entries expects ({self.n}, k), got {tuple(V.shape)}"
                )

    def _is_long(self, vectors: int) -> bool:
        """Whether so many vectors take more than one chunk, where float64 costs time."""
        return self.device.type == "cpu" and self.n * vectors > self._chunk

    def _parts(self, vectors: int, least: int = 1) -> Iterator[slice]:
        """Slices of the n entries, none of which has fewer than ``least``."""
        rows = max(least, 1024, self._chunk // max(1, vectors))
        count = max(1, math.ceil(self.n / rows))
        if self.n < count * least:
            count = max(1, self.n // least)
        for i in range(count):
            yield slice(i * self.n // count, (i + 1) * self.n // count)


# How many products of float32 numbers BLAS adds up by itself, in lanes of 16 at least: off by 2^11 roundings
# at most, by some tens where all numbers are the same, and by less than one else.
_SHORT = 1 << 15


def powers(sizes: Tensor) -> Tensor:
    """Powers of two near some sizes; 1 for zero, and for what is not finite.

    Dividing by them changes no digit, and squares of entries neither over- nor underflow any more.
    """
    usual = sizes.isfinite() & (sizes > 0)
    return torch.where(usual, sizes / (2 * torch.frexp(sizes).mantissa), 1.0)


def _in_range(sums: Tensor) -> bool:
    """Whether products of float32 numbers that add up to these have neither over- nor underflown."""
    size = float(sums.abs().max()) if sums.numel() else 1.0
    return 2.0**-80 < size < float("inf")  # False for NaN, too


class _Wide:
    """Chunks in float64, in memory that serves for one after the other."""

    def __init__(self) -> None:
        self._rooms: dict[int, Tensor] = {}

    def __call__(self, key: int, piece: Tensor) -> Tensor:
        """``piece`` in float64; itself if it is."""
        if piece.dtype is torch.float64:
            return piece
        return self.room(key, piece, torch.float64).copy_(piece)

    def room(self, key: int, piece: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for as much as ``piece``, overwritten by what comes next for this ``key``."""
        rows, k = piece.shape
        room = self._rooms.get(key)
        if room is None or room.shape[1] < rows:
            room = torch.empty(k, rows + 1, dtype=dtype or piece.dtype, device=piece.device)
            self._rooms[key] = room
        return room[:, :rows].T
