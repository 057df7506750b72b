"""Gauss quadrature from Lanczos: where the spectral measure of a random vector puts its mass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator


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
    def begin(V: Tensor) -> Recurrences:
        """From columns ``(n, b)``, which are normalized."""
        V = V / torch.linalg.vector_norm(V, dim=0)
        none = torch.empty(0, V.shape[1], dtype=torch.float64)
        return Recurrences(torch.zeros_like(V), V, none, none)

    def step(self, A: LinearOperator) -> Recurrences:
        """After one product more."""
        V = self.current
        F = A @ V
        if self.beta.shape[0]:
            F = F - self.last * self.beta[-1].to(F)
        alpha = (V * F).sum(0)
        F = F - V * alpha
        beta = torch.linalg.vector_norm(F, dim=0)
        size = torch.cat([self.alpha.abs(), self.beta, alpha.cpu().double()[None].abs()]).amax(0)
        done = beta.cpu().double() <= 10 * torch.finfo(F.dtype).eps * size
        beta = torch.where(done.to(F.device), 0.0, beta)  # an invariant subspace is complete
        following = torch.where(beta > 0, F / torch.where(beta > 0, beta, 1.0), 0.0)
        return Recurrences(
            V,
            following,
            torch.cat([self.alpha, alpha.cpu().double()[None]]),
            torch.cat([self.beta, beta.cpu().double()[None]]),
        )

    def measure(self, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Nodes and weights ``(steps, b)``; the weights of a column sum to one."""
        alpha = self.alpha[:steps]
        beta = self.beta[: alpha.shape[0] - 1]
        T = torch.diag_embed(alpha.T)
        T = T + torch.diag_embed(beta.T, 1) + torch.diag_embed(beta.T, -1)
        nodes, vectors = torch.linalg.eigh(T)
        return nodes.T, (vectors[:, 0, :] ** 2).T


@dataclass(frozen=True)
class Quadrature:
    """Finished recurrences of earlier groups of probes, and those of the group at work."""

    nodes: Tensor  # (steps, probes), float64 on the host
    weights: Tensor  # (steps, probes), zero behind the end of a shorter one
    group: Recurrences | None = None
    products: int = 0

    @staticmethod
    def empty() -> Quadrature:
        none = torch.empty(0, 0, dtype=torch.float64)
        return Quadrature(none, none)

    @property
    def probes(self) -> int:
        """How many have finished."""
        return self.nodes.shape[1]

    def stepped(self, A: LinearOperator, begin: Callable[[], Tensor]) -> Quadrature:
        """After one step of the group at work, or of a new group of the probes that ``begin`` draws."""
        group = self.group or Recurrences.begin(begin())
        products = self.products + group.current.shape[1]
        return replace(self, group=group.step(A), products=products)

    def finished(self) -> Quadrature:
        """With the group at work among the finished ones."""
        if self.group is None:
            return self
        pairs = zip((self.nodes, self.weights), self.group.measure(), strict=True)
        nodes, weights = (_side_by_side(old, new) for old, new in pairs)
        return replace(self, nodes=nodes, weights=weights, group=None)

    def pack(self) -> dict[str, Any]:
        """As plain values."""
        group = {} if self.group is None else {f"group.{k}": v for k, v in vars(self.group).items()}
        return {"nodes": self.nodes, "weights": self.weights, "products": self.products, **group}

    @staticmethod
    def unpack(saved: Mapping[str, Any]) -> Quadrature:
        """The inverse of `pack`."""
        names = ("last", "current", "alpha", "beta")
        group = None
        if "group.last" in saved:
            group = Recurrences(*(saved[f"group.{name}"] for name in names))
        return Quadrature(saved["nodes"], saved["weights"], group, saved["products"])


def _side_by_side(A: Tensor, B: Tensor) -> Tensor:
    rows = max(A.shape[0], B.shape[0])
    padded = [torch.cat([M, M.new_zeros(rows - M.shape[0], M.shape[1])]) for M in (A, B)]
    return torch.cat(padded, 1)
