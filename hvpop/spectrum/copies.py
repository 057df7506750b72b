"""Copies of eigenvalues, which one Krylov space does not see: what a second one tells of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Search:
    """What a second Krylov space, begun at random outside of what is found, tells of missing eigenvalues.

    Let ``u`` be a unit eigenvector that is missing, for the eigenvalue ``x``: orthogonal to all that is found,
    and to the Krylov space that it was found in. Then ``Q'u = amplitudes @ a`` and ``X'u = ahead @ a``, where
    ``a`` is its part in the random start, because ``u'A = x u'`` continues them from step to step.
    As ``|Q'u| <= 1``, ``a`` must be small, which for a random start is improbable.
    """

    suspects: Tensor  # (c,), the places x where an eigenvalue may still be missing
    amplitudes: Tensor  # (c, size, b)
    ahead: Tensor  # (c, width of X, b)
    begun: int  # the products before

    def followed(self, coupling: Tensor, C: Tensor, room: int) -> Search:
        """One step on, where ``room`` dimensions are searched.

        ``F'u = x X'u - C'Q'u`` for the part ``F`` of ``A X`` outside of ``Q``.
        """
        amplitudes = torch.cat([self.amplitudes, self.ahead], 1)
        F = self.suspects[:, None, None] * self.ahead - C.T @ amplitudes
        ahead = coupling / (coupling * coupling).sum(1, keepdim=True) @ F
        # P(|M a| <= 1) is at most the density of a at 0 times the volume of that ellipsoid.
        b = ahead.shape[2]
        volumes = torch.linalg.svdvals(torch.cat([amplitudes, ahead], 1)).log().sum(1)
        ball = b / 2 * math.log(math.pi) - math.lgamma(b / 2 + 1)
        possible = ball + b / 2 * math.log(room / (2 * math.pi)) - volumes > math.log(_MISSED)
        return replace(
            self, suspects=self.suspects[possible], amplitudes=amplitudes[possible],
            ahead=ahead[possible],
        )  # fmt: skip


_MISSED = 5e-3  # the probability that a search overlooks what is missing
