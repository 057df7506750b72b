"""The block diagonal of a matrix over parameters, by layers or other groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from ..operators import BlockDiagonal, LinearOperator
from ..operators.algebra import Product, Transposed
from ..operators.restriction import picked
from ..risk.modules import Selection

Grouping = Literal["layer", "parameter"] | Callable[[str], str]
"""By module, by parameter, or by whatever a function of the parameter's name returns."""


def block_diagonal(H: LinearOperator, by: Grouping = "layer") -> LinearOperator:
    """``H`` without what couples one group of parameters to another, same shape and order.

    Parameters
    ----------
    H : HessianOperator, GaussNewtonOperator or another with blocks
        Live; the result follows the model as ``H`` does, and can be linearized.
    by
        ``"layer"`` groups the parameters of each module, ``"parameter"`` each by itself; or a
        function from a parameter's name to its group.

    Notes
    -----
    Each block makes a pass over the data for each product; linearize to read them once.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator, block_diagonal
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> H = HessianOperator(model, torch.nn.MSELoss(), [(torch.ones(4, 2), torch.ones(4, 1))])
    >>> block_diagonal(H).parts
    (<9x9 HessianOperator float32 cpu>, <4x4 HessianOperator float32 cpu>)
    """
    block = getattr(H, "block", None)
    if block is None or H.layout is None:
        raise TypeError(
            f"block_diagonal expects a HessianOperator, got {H!r}; take the blocks of the Hessian, and "
            "combine or linearize the result"
        )
    if isinstance(by, str) and by not in _BY:
        raise ValueError(f"block_diagonal expects by in {tuple(_BY)} or a function, got {by!r}")
    group_of = _BY[by] if isinstance(by, str) else by
    groups: dict[str, list[str]] = {}
    for name in H.layout.names:
        groups.setdefault(group_of(name), []).append(name)
    blocks = BlockDiagonal([block(names) for names in groups.values()])
    order = [name for names in groups.values() for name in names]
    if order == list(H.layout.names):
        return blocks
    P = picked(H, order)
    return Product(Transposed(P), blocks, P)


class Divisible(Protocol):
    """A symmetric operator over named parameters, of which some can be chosen."""

    def restricted(self, params: Selection) -> LinearOperator: ...


def between(A: Divisible, rows: Selection, cols: Selection) -> LinearOperator:
    """The block of some parameters against others, the same ones if ``cols`` is None."""
    above = A.restricted(rows)
    if cols is None:
        return above
    row_names, col_names = _names(above), _names(A.restricted(cols))
    if row_names == col_names:
        return above
    joint = A.restricted([*row_names, *col_names])
    return Product(picked(joint, row_names), joint, Transposed(picked(joint, col_names)))


def _names(A: LinearOperator) -> Sequence[str]:
    assert A.layout is not None
    return A.layout.names


_BY: dict[str, Callable[[str], str]] = {
    "layer": lambda name: name.rpartition(".")[0],
    "parameter": lambda name: name,
}
