"""What eigenvalues near zero may still contribute to f(A) v though Lanczos has not resolved them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def unresolved(
    f: Callable[[Tensor], Tensor], ritz: Tensor, values: Tensor, S: Tensor, size: Tensor
) -> Tensor:
    """The largest error, per unit of ``|v|``, that one eigenvector near zero may have left in ``Q f(T) e1``.

    Let ``u`` be a unit eigenvector of ``A`` for the eigenvalue ``x``. As ``A Q = Q T + beta q e'``, with
    ``e`` the last unit vector, ``(T - x) Q'u`` is a multiple of ``e``: whatever ``u`` is, ``Q'u`` has the
    direction of ``w = (T - x)^-1 e``, and it is no longer than 1. The part of the error along ``u``,
    ``u'(f(A) q1 - Q f(T) e1)``, is therefore at most ``|e1'(f(x) - f(T)) w| / |w|``: large where an
    eigenvalue could hide whose value of ``f`` the Ritz values do not tell, and small, without a
    product, once they do. For ``f = sign`` and positive Ritz values it is about twice the residual that
    minres has for ``A x = v``.

    It is computed for eigenvalues of either sign from twice the size of ``A`` down to rounding, by
    powers of two. What lies outside the domain of ``f`` is left out: values that are not finite, or ten
    times as large as all those at the Ritz values.

    Parameters
    ----------
    f
        Of eigenvalues, ``(r, p)``.
    ritz, values
        ``(r, m)``: the eigenvalues of ``T``, and ``f`` at them.
    S
        ``(r, m, m)``, the eigenvectors of ``T``.
    size
        ``(r,)``, that of ``A``.

    Returns
    -------
    Tensor
        ``(r,)``.

    Notes
    -----
    ``w`` is the vector of orthonormal polynomials at ``x``; the bound ``1 / |w|^2`` for the weight at
    ``x`` when ``w`` starts with 1 is the Christoffel function (G. H. Golub, G. Meurant 2010). Estimates
    from the residuals of shifted systems: T. Chen, A. Greenbaum, C. Musco, C. Musco (2022).
    """
    eps = torch.finfo(ritz.dtype).eps
    octaves = 2.0 ** torch.arange(math.log2(eps), 2, dtype=ritz.dtype, device=ritz.device)
    x = torch.cat([octaves, -octaves])  # (p,), in units of the size of A
    at_x = f(size.unsqueeze(1) * x)  # (r, p)
    largest = values.abs().amax(1, keepdim=True)
    allowed = at_x.abs() <= torch.where(largest > 0, 10 * largest, torch.inf)
    allowed &= at_x.isfinite()

    distance = (ritz / size.unsqueeze(1)).unsqueeze(1) - x.unsqueeze(1)  # (r, p, m)
    W = S[:, -1:] / torch.where(distance == 0, eps**2, distance)  # w in the eigenvectors of T
    W = W / W.abs().amax(2, keepdim=True)
    first = S[:, 0]
    P = W @ torch.stack([first, values * first], 2)  # (r, p, 2): e1'w and e1'f(T)w
    part = (at_x * P[..., 0] - P[..., 1]).abs() / W.square().sum(2).sqrt()
    return torch.where(allowed, part, 0.0).amax(1)
