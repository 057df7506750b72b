"""Low-rank sketches that grow: an orthonormal basis of what an operator does to random vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import LinearOperator, Space


def extend(space: Space, Q: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Y = Q C + E R`` with ``[Q, E]`` orthonormal: returns ``E``, ``C`` and ``R``.

    Columns of ``Y`` that lie in ``Q`` or depend on each other get a direction of their own in ``E``
    and a diagonal entry in ``R`` that is tiny, but never zero. ``C`` and ``R`` are float64.
    """
    eps = torch.finfo(Y.dtype).eps
    scale = space.norms(Y).max()
    C = space.inner(Q, Y)
    E, R = space.qr(torch.addmm(Y, Q, C.to(Y), alpha=-1))
    for _ in range(2):  # what was lost in rounding came out at random: once more
        D = space.inner(Q, E)
        if D.numel() == 0 or float(D.abs().max()) <= eps / 8:
            break
        E, again = space.qr(E.addmm_(Q, D.to(E), alpha=-1))
        C, R = C + D @ R, again @ R
    floor = eps * torch.where(scale > 0, scale, 1.0)
    d = R.diagonal()
    R = R + torch.diag(torch.where(d.abs() < floor, torch.where(d < 0, -floor, floor), 0.0))
    return E, C, R


@dataclass(frozen=True)
class LeaveOut:
    """What is known after products with ``Omega`` and with the basis ``Q`` of ``A Omega = Q R``.

    The small matrices are in float64 on the host; they allow to leave out one or two probes of the
    sketch at no product (Epperly, Tropp and Webber, 2024, leave out one).
    """

    Omega: Tensor  # (n, N)
    Q: Tensor  # (n, N)
    Z: Tensor  # A Q, (n, N), or (n, 0) where it is not needed
    R: Tensor  # (N, N), upper triangular
    H: Tensor  # Q' A Q
    W: Tensor  # Q' Omega
    quadratic: Tensor  # (N,), omega' A omega
    squares: Tensor  # (N,), omega' omega

    @staticmethod
    def empty(n: int, dtype: torch.dtype, device: torch.device) -> LeaveOut:
        big = torch.empty(n, 0, dtype=dtype, device=device)
        small = torch.empty(0, 0, dtype=torch.float64)
        none = small.reshape(0)
        return LeaveOut(big, big, big, small, small, small, none, none)

    def grown(self, A: LinearOperator, Omega: Tensor, Y: Tensor, *, keep: bool) -> LeaveOut:
        """After another block product, with ``Y = A Omega``; ``keep`` says whether to keep ``A Q``."""
        space = A.space
        E, C, R = extend(space, self.Q, Y)
        Z = A @ E
        Q = beside(self.Q, E)
        H = _small(space.inner(Q, Z))
        N, old = Q.shape[1], self.Q.shape[1]
        every = beside(self.Omega, Omega)
        corner = (H[old:] + H[old:].T) / 2
        W = _small(space.inner(E, every))
        return LeaveOut(
            every,
            Q,
            beside(self.Z, Z) if keep else self.Z,
            _bordered(self.R, _small(C), torch.zeros(N - old, old, dtype=torch.float64), _small(R)),
            _bordered(self.H, H[:old], H[:old].T, corner),
            torch.cat([torch.cat([self.W, _small(space.inner(self.Q, Omega))], 1), W], 0),
            torch.cat([self.quadratic, _small(space.dots(Omega, Y))]),
            torch.cat([self.squares, _small(space.dots(Omega, Omega))]),
        )

    def directions(self) -> tuple[Tensor, Tensor]:
        """Unit columns ``s_i``: without probe i the basis is ``Q (I - s_i s_i')``; and ``s_i' R_i``."""
        eye = torch.eye(self.R.shape[0], dtype=torch.float64)
        S = torch.linalg.solve_triangular(self.R.T, eye, upper=False)
        S = S / S.square().sum(0).sqrt()
        return S, (S * self.R).sum(0)


@dataclass(frozen=True)
class Split:
    """An operator split by the basis ``Q`` of a sketch: exact inside, sampled by ``G`` outside."""

    Q: Tensor  # (n, N)
    Z: Tensor  # A Q, (m, N)
    G: Tensor  # (n, N), independent of Q
    AG: Tensor  # (m, N)

    @staticmethod
    def empty(A: LinearOperator, dtype: torch.dtype) -> Split:
        rows, columns = (torch.empty(r, 0, dtype=dtype, device=A.device) for r in A.held)
        return Split(columns, rows, columns, rows)

    def grown(self, A: LinearOperator, Y: Tensor, G: Tensor, AG: Tensor) -> Split:
        """After a product more for each probe; ``Y`` is a sketch of the rows."""
        E, _, _ = extend(A.space, self.Q, Y)
        pairs = ((self.Q, E), (self.Z, A @ E), (self.G, G), (self.AG, AG))
        return Split(*(beside(*pair) for pair in pairs))

    def outside(self, space: Space) -> tuple[Tensor, Tensor]:
        """``P G`` and ``A P G`` for the projection ``P`` on the complement of ``Q``; no product."""
        C = space.inner(self.Q, self.G).to(self.Q)
        return self.G - self.Q @ C, self.AG - self.Z @ C


def beside(A: Tensor, B: Tensor) -> Tensor:
    """``[A, B]``, in the layout of a `Space`."""
    return torch.cat([A.T, B.T]).T


def _small(M: Tensor) -> Tensor:
    return M.cpu().double()


def _bordered(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return torch.cat([torch.cat([A, B], 1), torch.cat([C, D], 1)], 0)
