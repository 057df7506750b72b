"""Rows of samples, formed and kept where they are smaller than the graphs that they come from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..strategies import LinearMap, Params
from ..strategies.parted import Parted
from ..strategies.referee import generic
from ..strategies.rounding import agree, reordered, rounding
from ..strategies.through_outputs import KeptGraphs
from .memory import bytes_of
from .parts import Part, samples_of
from .rows import Moment, Rows

FORM_AFTER = 4
"""Products made before rows are formed, sample by sample, in the time of about two products. A number
and not a time, so that the same calls give the same bits."""


class Formed(LinearMap):
    """``sum_i w_i g_i g_i'`` by the rows ``g_i`` themselves: reads of them, and no pass of a model."""

    looks, bare = False, True

    def __init__(self, rows: Params, weights: Tensor) -> None:
        self._rows, self._weights = rows, weights  # (count, *parameter.shape); (count,)
        self.residual_bytes = bytes_of([*rows.values(), weights])

    def __call__(self, v: Params) -> Params:
        products = self.columns({name: t[None] for name, t in v.items()})
        return {name: t[0] for name, t in products.items()}

    def columns(self, V: Params) -> Params:
        parts = [V[name].flatten(1) @ G.flatten(1).T for name, G in self._rows.items()]
        U = torch.stack(parts).sum(0) * self._weights  # (k, count)
        return {name: (U @ G.flatten(1)).view_as(V[name]) for name, G in self._rows.items()}


def formed(linear: LinearMap, most: int) -> Formed | None:
    """The same map by its rows, if they take at most so many bytes; None where that is not so.

    A row is pulled back through its sample by itself, at the cost of a gradient of that. What the
    model makes of samples one by one is held against the map itself, on every parameter's own scale.
    """
    if not isinstance(linear, KeptGraphs) or not isinstance(linear.middle, Moment):
        return None
    parted, rows, point = linear.parted, linear.middle.rows, linear.parted.point
    like = next(iter(point.values()))
    alike = all(p.dtype == like.dtype and p.device == like.device for p in point.values())
    if not isinstance(rows, Rows) or not alike or like.dtype not in (torch.float32, torch.float64):
        return None
    if not 0 < rows.count * bytes_of(point.values()) <= most:
        return None
    try:
        with parted.around():
            found = Formed(_by_sample(parted, rows), rows.weights)
    except Exception:  # whatever a model does with a single sample, or without the memory for rows
        return None
    w = generic(point)
    truth = linear(w)

    def again() -> list[Tensor]:
        return [3 * t for t in linear({name: t / 3 for name, t in w.items()}).values()]

    products = found(w)
    same = [products[name] for name in truth]
    return found if agree(same, truth.values(), reordered(rounding(same)), again) else None


def _by_sample(parted: Parted, rows: Rows) -> Params:
    reading, n = samples_of(parted)
    each, rest = divmod(rows.count, n)
    if rest:
        raise ValueError(f"{rows.count} rows of {n} samples")
    found = {name: p.new_empty(rows.count, *p.shape) for name, p in parted.point.items()}
    for j, unit in enumerate(
        torch.eye(each).to(rows.weights)
    ):  # of each sample one row, all at once
        among = rows.spread(unit.repeat(n))
        for i in range(n):
            part = Part(parted, reading, n, slice(i, i + 1))
            pairs = part.pairs(among, part.parted.outputs)
            if pairs is None:
                raise ValueError("the outputs of a sample by itself have another shape")
            for name, g in part.parted.pull([s for s, _ in pairs], keep=False).items():
                found[name][i * each + j] = g
    return found
