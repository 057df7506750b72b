"""The spectrum layer by layer: the diagonal blocks of an operator over named parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import LinearOperator, arguments
from ..operators.arguments import Seed
from ..operators.restriction import picked
from .density import spectral_density
from .eigsh import eigsh
from .results import Density, Status
from .trace import trace


@dataclass(frozen=True, repr=False)
class Layerwise:
    """One row a layer, in the model's order, from `layerwise`; prints as a table."""

    names: tuple[str, ...]
    entries: tuple[int, ...]  # parameters of each layer
    trace: Tensor  # (layers,)
    trace_error: Tensor  # (layers,), standard errors
    share: Tensor  # (layers,), of the trace of all of them
    largest: Tensor  # (layers,), the largest eigenvalue of the layer's block
    residual: Tensor  # (layers,), the norm of its residual
    negative: Tensor  # (layers,), the sum of |negative eigenvalues| over the sum of |eigenvalues|
    negative_error: Tensor  # (layers,); zero where all eigenvalues are known
    products: int  # with a block and one vector
    status: Status

    def __str__(self) -> str:
        width = max(len("layer"), *map(len, self.names))
        head = (
            f"{'layer':<{width}} {'entries':>10} {'trace':>11} {'share':>8} {'largest':>11} "
            f"{'negative':>9}"
        )
        rows = [
            f"{name:<{width}} {entries:>10} {trace:>11.4g} {100 * share:>6.1f} % {largest:>11.4g} "
            f"{100 * negative:>7.1f} %"
            for name, entries, trace, share, largest, negative in zip(
                self.names,
                self.entries,
                *(x.tolist() for x in (self.trace, self.share, self.largest, self.negative)),
                strict=True,
            )
        ]
        return "\n".join([head, *rows])

    def __repr__(self) -> str:
        return f"<{len(self.names)} layers, {self.products} products, {self.status}>"


def layerwise(
    H: LinearOperator,
    *,
    rtol: float = 0.05,
    max_products: int = 128,
    seed: Seed = 0,
    progress: bool = False,
) -> Layerwise:
    """Where in a model the curvature is: trace, largest eigenvalue and negative share of each layer.

    Parameters
    ----------
    H : LinearOperator
        Symmetric, over named parameters (`H.layout` is known): a `HessianOperator`, live or
        linearized, another matrix of its kind, a damped one.
    rtol : float
        Of each trace; see `hvpop.spectrum.trace`.
    max_products : int
        For each layer and each of the three numbers. A layer of no more entries is multiplied out.
    seed : int or torch.Generator
        Equal ones give equal numbers.
    progress : bool
        Show a bar over the layers.

    Returns
    -------
    Layerwise
        ``trace`` with its standard error and ``share``; ``largest`` with its residual; ``negative``:
        how much of the block's curvature, ``sum |lambda|``, lies in negative eigenvalues.

    Notes
    -----
    A layer is a module, all parameters of which make one diagonal block; blocks of a `HessianOperator`
    differentiate in these parameters only, those of other operators are cut out of whole products.
    What couples layers is in none of them. The negative share is by stochastic Lanczos quadrature
    (Lin, Saad and Yang 2016); its error is the standard error of the probes and the weight of
    the nodes next to zero, which stand for eigenvalues of both signs.

    Cost: up to ``3 max_products`` products a layer; memory: that of the functions it calls, for the
    largest layer.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator, layerwise
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    >>> data = [(torch.ones(4, 2).double(), torch.ones(4, 1).double())]
    >>> table = layerwise(HessianOperator(model, torch.nn.MSELoss(), data))
    >>> table.names, table.entries, round(float(table.share.sum()), 9)
    (('0', '2'), (9, 4), 1.0)
    """
    arguments.symmetric("layerwise", H, "take that of A.T @ A")
    arguments.counts("layerwise", max_products=max_products)
    seed = arguments.seed("layerwise", seed)
    if H.layout is None:
        raise ValueError(
            f"layerwise expects an operator over named parameters, got {H!r} without a layout; "
            "take a HessianOperator, or a sum in which it is"
        )
    status: Status = "converged"
    names: list[str] = []
    entries: list[int] = []
    rows: list[tuple[float, ...]] = []
    products = 0
    blocks: Iterable[tuple[str, LinearOperator]] = list(_blocks(H))
    if progress:
        from tqdm.auto import tqdm

        blocks = tqdm(blocks, desc="layers", unit=" layers")
    for name, block in blocks:
        top = eigsh(block, 1, "LA", max_products=max(max_products, 2), seed=seed)
        whole = trace(block, rtol=rtol, max_products=max_products, seed=seed)
        steps = min(32, max_products)
        spread = spectral_density(block, steps=steps, max_products=max_products, seed=seed)
        names.append(name)
        entries.append(block.shape[0])
        rows.append(
            (
                whole.value,
                whole.standard_error,
                top.eigenvalues[-1].item(),
                top.residuals[-1].item(),
                *_negative(spread),
            )
        )
        products += top.products + whole.products + spread.products
        found = [part.status for part in (top, whole, spread)]
        if "interrupted" in found:
            status = "interrupted"
            break
        if top.status != "converged":
            status = "max products"
    traces, errors, largest, residual, negative, negative_error = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    return Layerwise(
        tuple(names), tuple(entries), traces, errors, traces / traces.sum(), largest, residual,
        negative, negative_error, products, status,
    )  # fmt: skip


def _blocks(H: LinearOperator) -> Iterator[tuple[str, LinearOperator]]:
    """Each layer's name and diagonal block, ready for many products."""
    assert H.layout is not None
    groups: dict[str, list[str]] = {}
    for name in H.layout.names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    of_its_own = getattr(H, "block", None)
    whole = H if of_its_own is not None else H.linearize()
    for layer, names in groups.items():
        title = layer or ", ".join(names)
        if of_its_own is not None:
            yield title, of_its_own(names)
            continue
        S = picked(H, names)
        yield title, S @ whole @ S.T


def _negative(density: Density) -> tuple[float, float]:
    """The negative share of ``sum |lambda|`` over the probes, and its error.

    The share is a ratio of forms ``z' g(A) z`` of random unit vectors, whose variance the quadrature
    tells (see `spectral_density`): a few probes' spread would not. To it comes what the nodes next to
    zero weigh, each of which stands for eigenvalues on both sides of it.
    """
    nodes, weights, n = density.nodes, density.weights, density.order
    probes = nodes.shape[1]
    below, sizes = nodes < 0, nodes.abs() * weights
    whole = float(sizes.sum())
    if whole == 0.0:
        return 0.0, 0.0
    share = float(sizes[below].sum()) / whole
    if nodes.shape[0] >= n:
        return share, 0.0
    rest = nodes.abs() * (below.double() - share)  # of a ratio of sums (Cochran 1977): of mean zero
    variance = 2 / (n + 2) * float((weights * rest.square()).sum()) / probes**2
    doubtful = 0.0
    for side in (below, ~below):
        nearest = torch.where(side, nodes.abs(), torch.inf).min(0)
        doubtful += float(
            sizes.gather(0, nearest.indices[None])[0][nearest.values.isfinite()].sum()
        )
    return share, variance**0.5 * probes / whole + doubtful / whole
