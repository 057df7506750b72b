"""Preconditioners: cheap operators close to the inverse of a symmetric positive definite one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operators import Diagonal, Identity, LinearOperator, LowRank, arguments, measured
from ..operators.algebra import Sum
from ..operators.arguments import Seed
from ..operators.crossing import working_dtype
from . import checks


def jacobi(A: LinearOperator, samples: int = 32, *, seed: Seed = 0) -> Diagonal:
    """The inverse of the diagonal of ``A``, which is estimated from random products.

    Each of the ``samples`` products multiplies a vector of random signs. An entry is taken
    as no smaller than its own standard error, so that the result is positive and noise cannot make
    an entry of the preconditioner large.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, with its damping: ``jacobi(Damped(H, c))``.
    samples
        How many products, in one block ``(n, samples)``; at least 2.
    seed : int or torch.Generator
        Of the random signs; the same on every device.

    Notes
    -----
    C. Bekas, E. Kokiopoulou, Y. Saad (2007). It helps where rows differ much in size, and does
    little where the matrix is far from its diagonal, as most Hessians are: then use `nystrom`.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.solvers import jacobi
    >>> jacobi(Diagonal(torch.tensor([1.0, 4.0])), samples=2).d
    tensor([1.0000, 0.2500])
    """
    checks.symmetric("jacobi", A, "no preconditioner here is for it")
    arguments.counts("jacobi", least=2, samples=samples)
    generator = torch.Generator().manual_seed(arguments.seed("jacobi", seed))
    signs = torch.randint(0, 2, (A.shape[0], samples), generator=generator) * 2 - 1
    V = signs.to(dtype=working_dtype(A.torch_dtype), device=A.device)
    Y: Tensor = A.linearize() @ V
    measured.finite("jacobi", A, Y)
    size = measured.unit(Y) or 1.0
    products = V * (Y / size)
    error, mean = torch.std_mean(products, dim=1)
    d = torch.maximum(mean.abs(), error / math.sqrt(samples))
    largest = d.max()
    smallest = largest * torch.finfo(d.dtype).eps
    return Diagonal(1 / d.clamp_min(smallest) / size if bool(largest > 0) else torch.ones_like(d))


class Nystrom(Sum):
    """The inverse of ``U diag(eigenvalues) U' + damping I``, up to a factor, where U is known.

    On the span of ``U`` it undoes the eigenvalues; elsewhere it is the identity. Made by `nystrom`.

    Attributes
    ----------
    eigenvalues : Tensor
        ``(rank,)``, descending: those of the approximation of ``A``.
    eigenvectors : Tensor
        ``(n, rank)``, orthonormal.
    damping : float
    products : int
        What it cost.
    """

    def __init__(
        self, eigenvalues: Tensor, eigenvectors: Tensor, damping: float, products: int
    ) -> None:
        weights = (eigenvalues[-1] + damping) / (eigenvalues + damping)
        change = LowRank(eigenvectors, weights.to(eigenvectors.dtype) - 1)
        super().__init__(Identity.like(change), change)
        self.eigenvalues, self.eigenvectors = eigenvalues, eigenvectors
        self.damping, self.products = damping, products

    def _label(self) -> str:
        return f"Nystrom({self.eigenvalues.shape[0]}, damping={self.damping:g})"


def nystrom(A: LinearOperator, rank: int, damping: float, *, seed: Seed = 0) -> Nystrom:
    """A preconditioner for ``A + damping I`` from ``rank`` products with random vectors.

    It removes the largest eigenvalues: what remains has a condition number of about
    ``1 + (eigenvalue number rank) / damping``, so that a rank at which the last of its `eigenvalues` is
    a few times the damping leaves little to do. The products pay when the eigenvalues decay, as those
    of a Hessian do, and they pay once for all right-hand sides.

    Parameters
    ----------
    A : LinearOperator
        Symmetric positive semidefinite, WITHOUT the damping. Negative eigenvalues that the
        damping outweighs (a Hessian near a minimum) are borne: the approximation is then that
        of ``A`` shifted, and clipped at zero after shifting back.
    rank
        Between 1 and n: how many products, in one block ``(n, rank)``.
    damping
        Positive, uniform.
    seed : int or torch.Generator
        Of the random vectors; the same on every device.

    Notes
    -----
    Z. Frangella, J. A. Tropp, M. Udell (2023), "Randomized Nystrom preconditioning", algorithm 2.1
    with its shift for stability. Beyond the products O(n rank^2) arithmetic.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Damped, Diagonal
    >>> from hvpop.solvers import cg, nystrom
    >>> A = Diagonal(2.0 ** -torch.arange(50, dtype=torch.float64))
    >>> b = torch.ones(50, dtype=torch.float64)
    >>> plain = cg(Damped(A, 1e-4), b)
    >>> preconditioned = cg(Damped(A, 1e-4), b, preconditioner=nystrom(A, 15, 1e-4))
    >>> preconditioned.steps < plain.steps / 3
    True
    """
    checks.symmetric("nystrom", A, "no preconditioner here is for it")
    n = A.shape[0]
    arguments.counts("nystrom", rank=rank)
    if rank > n:
        raise ValueError(f"nystrom({A!r}) expects a rank between 1 and {n}, got {rank}")
    arguments.positive("nystrom", damping=damping)
    dtype = working_dtype(A.torch_dtype)
    generator = torch.Generator().manual_seed(arguments.seed("nystrom", seed))
    gaussian = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    space = A.space
    Omega = space.qr(gaussian.to(dtype=dtype, device=A.device))[0]
    Y: Tensor = A.linearize() @ Omega
    measured.finite("nystrom", A, Y)
    unit = measured.unit(Y) or 1.0
    Y = Y / unit
    size = float(space.norms(Y).square().sum().sqrt())
    core = space.inner(Omega, Y).to(Y)
    core = (core + core.T) / 2
    shift = torch.finfo(dtype).eps * math.sqrt(n) * size
    lowest = float(torch.linalg.eigvalsh(core)[0])
    if lowest < 0:
        shift = max(shift, damping / unit, -2 * lowest)
    shift = max(shift, torch.finfo(dtype).tiny)
    Y += shift * Omega
    L = torch.linalg.cholesky(core + shift * torch.eye(rank, dtype=dtype, device=A.device))
    F = torch.linalg.solve_triangular(L, Y.T, upper=False).T  # F F' approximates A + shift I
    Q, R = space.qr(F)
    small, sigma, _ = torch.linalg.svd(R.to(F))
    U = Q @ small
    return Nystrom((sigma.square() - shift).clamp_min(0) * unit, U, damping, products=rank)
