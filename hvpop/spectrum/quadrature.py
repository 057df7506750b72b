"""Gauss quadrature from Lanczos: where the spectral measure of a random vector puts its mass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..operators import LinearOperator, Space
from .sketch import beside, extend

Measure = tuple[Tensor, Tensor]
"""Nodes and weights ``(m, b)``, float64 on the host; the weights of a column sum to one."""


@dataclass(frozen=True)
class Recurrences:
    """Lanczos from ``b`` unit vectors side by side: one block product a step, two blocks kept.

    Not orthogonalized: the copies of eigenvalues that come of it share the mass of the original, so
    that sums over the measure stay right (Greenbaum 1989, Knizhnerman 1996).
    """

    last: Tensor  # (n, b)
    current: Tensor  # (n, b)
    alpha: Tensor  # (steps, b), float64 on the host
    beta: Tensor  # (steps, b)

    @staticmethod
    def begin(space: Space, V: Tensor) -> Recurrences:
        """From columns ``(n, b)``, which are normalized in place."""
        V /= space.norms(V).to(V)
        none = torch.empty(0, V.shape[1], dtype=torch.float64)
        return Recurrences(torch.zeros_like(V), V, none, none)

    @property
    def steps(self) -> int:
        """How many have been taken."""
        return self.alpha.shape[0]

    @property
    def complete(self) -> bool:
        """Whether all eigenvalues are known, which two blocks cannot tell."""
        return False

    def step(self, A: LinearOperator) -> Recurrences:
        """After one product more."""
        V, space = self.current, A.space
        F = A @ V
        if self.beta.shape[0]:
            F.addcmul_(self.last, self.beta[-1].to(F), value=-1)
        alpha = space.dots(V, F)
        F.addcmul_(V, alpha.to(F), value=-1)
        alpha, beta = alpha.cpu(), space.norms(F).cpu()
        size = torch.cat([self.alpha.abs(), self.beta, alpha[None].abs()]).amax(0)
        done = beta <= 10 * torch.finfo(F.dtype).eps * size
        beta = torch.where(done, 0.0, beta)  # an invariant subspace is complete
        F *= torch.where(done, 0.0, 1 / torch.where(done, 1.0, beta)).to(F)
        return Recurrences(
            V, F, torch.cat([self.alpha, alpha[None]]), torch.cat([self.beta, beta[None]])
        )

    def measure(self, floor: float | None = None) -> Measure:
        """Gauss's rule; with a ``floor`` below all eigenvalues Gauss and Radau's, with a node there."""
        alpha, beta = self.alpha.T, self.beta.T
        T = torch.diag_embed(alpha)
        T = T + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
        if floor is not None:
            K = torch.zeros(T.shape[0], 1, T.shape[1], dtype=T.dtype)
            K[:, 0, -1] = beta[:, -1]
            T = _closed(T, K, floor)
        nodes, vectors = torch.linalg.eigh(T)
        return nodes.T, (vectors[:, 0, :] ** 2).T


@dataclass(frozen=True)
class Block:
    """Block Lanczos from ``b`` vectors, orthogonalized: they share a space that ends as the whole one.

    After ``n`` products ``T`` has the eigenvalues of ``A``, for a memory of ``n^2`` numbers.
    """

    Q: Tensor  # (n, m), orthonormal
    current: Tensor  # (n, c), the directions to multiply next; none when all have been
    T: Tensor  # Q' A Q, (m, m), float64 on the host like all that follows
    coupling: Tensor  # current' A Q, (c, m)
    first: Tensor  # Q' V for the unit vectors V of the start, (c, b) with the first c rows of Q'
    steps: int = 0

    @staticmethod
    def begin(space: Space, V: Tensor) -> Block:
        """From columns ``(n, b)``, which are normalized in place."""
        V /= space.norms(V).to(V)
        X = space.qr(V[:, : space.order])[0]
        none = torch.empty(0, 0, dtype=torch.float64)
        return Block(X[:, :0], X, none, none, space.inner(X, V).cpu())

    @property
    def complete(self) -> bool:
        """Whether all eigenvalues are known."""
        return self.current.shape[1] == 0

    def step(self, A: LinearOperator) -> Block:
        """After one block product more."""
        F, space = A @ self.current, A.space
        Q = beside(self.Q, self.current)
        C = space.inner(Q, F).cpu()
        m = self.Q.shape[1]
        C[m:] = (C[m:] + C[m:].T) / 2
        T = torch.cat([torch.cat([self.T, C[:m]], 1), C.T], 0)
        room = space.order - Q.shape[1]
        if room == 0:
            return Block(Q, F[:, :0], T, T[:0], self.first, self.steps + 1)
        E, _, R = extend(space, Q, F[:, :room])
        coupling = torch.zeros(E.shape[1], Q.shape[1], dtype=torch.float64)
        coupling[:, m : m + R.shape[1]] = R.cpu()
        coupling[:, m + R.shape[1] :] = space.inner(E, F[:, R.shape[1] :]).cpu()
        return Block(Q, E, T, coupling, self.first, self.steps + 1)

    def measure(self, floor: float | None = None) -> Measure:
        """As for `Recurrences`; the nodes of all columns are the same."""
        T = self.T
        if floor is not None and not self.complete:
            T = _closed(T[None], self.coupling[None], floor)[0]
        nodes, vectors = torch.linalg.eigh(T)
        weights = (vectors[: self.first.shape[0]].T @ self.first) ** 2
        return nodes[:, None].expand_as(weights), weights / weights.sum(0)


def _closed(T: Tensor, K: Tensor, floor: float) -> Tensor:
    """``T`` with the border ``K`` and the corner that makes ``floor`` an eigenvalue of it (Golub 1973)."""
    theta, S = torch.linalg.eigh(T)
    KS = K @ S
    # what is below the floor can be there by rounding only
    gap = (theta - floor).clamp_min(torch.finfo(T.dtype).eps * theta.abs().amax(-1, keepdim=True))
    corner = floor * torch.eye(K.shape[-2], dtype=T.dtype) + (KS / gap[..., None, :]) @ KS.mT
    return torch.cat([torch.cat([T, K.mT], -1), torch.cat([K, corner], -1)], -2)


@dataclass(frozen=True)
class Quadrature:
    """Finished recurrences of earlier groups of probes, and those of the group at work."""

    nodes: Tensor  # (m, probes), float64 on the host
    weights: Tensor  # (m, probes), zero behind the end of a shorter one
    group: Recurrences | Block | None = None
    products: int = 0
    steps: int = 0  # of the group that finished last
    exact: bool = False  # whether the nodes are all eigenvalues of A, in one column

    @staticmethod
    def empty() -> Quadrature:
        none = torch.empty(0, 0, dtype=torch.float64)
        return Quadrature(none, none)

    @property
    def probes(self) -> int:
        """How many have finished."""
        return self.nodes.shape[1]

    def stepped(self, A: LinearOperator, begin: Callable[[], Recurrences | Block]) -> Quadrature:
        """After one step of the group at work, or of the new group that ``begin`` makes."""
        group = self.group or begin()
        products = self.products + group.current.shape[1]
        return replace(self, group=group.step(A), products=products)

    def finished(self) -> Quadrature:
        """With the group at work among the finished ones, or all that is to be known."""
        group = self.group
        if group is None:
            return self
        nodes, weights = group.measure()
        if group.complete:
            nodes, weights = nodes[:, :1], torch.full_like(nodes[:, :1], 1 / nodes.shape[0])
        else:
            pairs = ((self.nodes, nodes), (self.weights, weights))
            nodes, weights = (_side_by_side(old, new) for old, new in pairs)
        return Quadrature(nodes, weights, None, self.products, group.steps, group.complete)


def _side_by_side(A: Tensor, B: Tensor) -> Tensor:
    rows = max(A.shape[0], B.shape[0])
    padded = [torch.cat([M, M.new_zeros(rows - M.shape[0], M.shape[1])]) for M in (A, B)]
    return torch.cat(padded, 1)
