"""Eigenvalues at the ends of the spectrum, by thick-restart block Lanczos with honest residuals."""

from __future__ import annotations

import os

from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.arguments import Seed
from . import spread
from .lanczos import Lanczos, Which
from .loop import run
from .results import Eigenpairs


def eigsh(
    A: LinearOperator,
    k: int = 6,
    which: Which = "LA",
    *,
    block: int = 1,
    basis: int | None = None,
    v0: Tensor | None = None,
    deflate: Tensor | None = None,
    rtol: float | None = None,
    max_products: int | None = None,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    data_error: bool = False,
) -> Eigenpairs:
    """Eigenvalues and eigenvectors of a symmetric operator.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, ``(n, n)``.
    k : int
        How many pairs.
    which : {"LA", "SA", "LM", "SM", "BE"}
        Largest or smallest algebraically, largest or smallest in magnitude, or half from both ends
        (one more from the high end if ``k`` is odd). "SM" inside an indefinite spectrum converges
        slowly for want of an inverse.
    block : int
        Columns a product. More columns need fewer passes over the data, but more products, and find
        eigenvalues of a multiplicity up to ``block`` at once; with fewer, each copy is found in turn.
    basis : int, optional
        Vectors kept. Default ``max(20, 2 k) + 10 block`` up to ``2^20`` entries; beyond
        ``max(18, 2 k) + 2 block``, and fewer where those are more than ``2^28`` numbers.
    v0 : Tensor, optional
        Earlier eigenvectors or other guesses, ``(n,)`` or ``(n, j)``; they need not be orthonormal.
    deflate : Tensor, optional
        Known eigenvectors ``(n, d)``; the search runs in their orthogonal complement, and finds
        nothing more exact than they are.
    rtol : float, optional
        A pair counts as found when ``|A v - lambda v| <= rtol |A|``. The default is the square root
        of the machine epsilon: an eigenvalue apart from the others is then exact to rounding,
        because its error goes with the square of the residual.
    max_products : int, optional
        The budget; default ``1000 + 40 k``.
    seed : int or torch.Generator
        Of the random start; equal seeds give equal results. A generator is left one number further.
    progress : bool
        Show a bar with the largest residual.
    checkpoint : path, optional
        Save there from time to time and at the end; if the file exists, continue from it.
    data_error : bool
        Tell by the spread over batches (`LinearOperator.batch_forms`) how far each eigenvalue may
        be from that of the population the data were drawn from: `data_errors`, to first order in
        the size of the sample, for eigenvalues that stand further apart than that. Costs ``k``
        products beyond the budget, in one pass at the end. None after Ctrl-C.

    Returns
    -------
    Eigenpairs
        Ascending eigenvalues. ``status`` is "converged": the residuals are as small as asked, and no
        copy of a wanted eigenvalue is missing, but for a chance of 0.5 %. Else "max products",
        "unresolved copies" (the budget was spent while one might still be missing), "stagnated"
        (``rtol`` is below what the dtype or the deflated vectors allow) or "interrupted" (Ctrl-C);
        then the pairs are the best so far, fewer than ``k`` after fewer products, and `residuals`
        tell how good.

    Notes
    -----
    Lanczos vectors with full orthogonalization, restarted with the best Ritz vectors (Wu and Simon,
    2000) in their own memory. The recurrence tells the residuals as long as what it has lost, which is
    kept account of, is no more than rounding; else a product with each vector does.

    A Krylov space holds at most ``block`` vectors of an eigenspace. When all pairs are found, a second
    one, from a random vector, searches their complement, and the run goes on if it meets a wanted
    eigenvalue. A missing one, further than ``rtol |A|`` from the last that is wanted, is ruled out where
    it could only be there if its part in the random vector were improbably small: the search has seen
    all of an eigenvalue's share that the Christoffel function of its Ritz values does not allow (Golub
    and Meurant, 2010), which a priori takes the steps of Kuczynski and Wozniakowski (1992). That is
    about a tenth of the products. Where `v0` is given, not only copies but eigenvalues of any place are
    ruled out in this way, because the start has not been a random one.

    Cost: the products, and ``4 n basis`` flops for each.
    Memory: ``basis + k + 6 block`` vectors of ``n`` numbers at the peak, that of a product included; a
    checkpoint adds one for each part of the operator, and is written without a copy: a save appends the
    rows that are new, and writes the file anew after a restart.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.spectrum import eigsh
    >>> A = Diagonal(torch.arange(100, dtype=torch.float64))
    >>> found = eigsh(A, k=3)
    >>> found.eigenvalues.round()
    tensor([97., 98., 99.], dtype=torch.float64)
    >>> found.status
    'converged'
    """
    A = arguments.symmetric("eigsh", A).linearize()
    task = Lanczos(A, k, which, block, basis, v0, deflate, rtol, seed)
    budget = 1000 + 40 * k if max_products is None else max_products
    arguments.counts("eigsh", max_products=budget)
    if data_error:
        spread.required("eigsh", A)
    state, status = run(task, max_products=budget, progress=progress, checkpoint=checkpoint)
    found = task.result(state, status)
    return spread.of_eigenvalues("eigsh", A, found) if data_error else found
