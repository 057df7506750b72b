"""A program: a traced product, split into what runs once per point and what runs once per vector."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from ... import _torch
from ..rounding import agree, reordered, rounding
from .buffers import fuse_additions, reuse_buffers, spell_out_scales, wait_for_readers
from .simplifying import simplify
from .splitting import split
from .tracing import trace

Run = Callable[..., Sequence[Tensor]]
"""``run(*residuals, *v)``: the product, tensor by tensor."""


class Program:
    """``product(*inputs, *v)``, traced for inputs of certain shapes, dtypes and strides.

    `prepare` maps the inputs to the residuals: all that the product needs besides v. `run` maps
    residuals and v to the product, once `prove` has chosen it; None if nothing was right.
    `run_columns` does it for a block of columns, once `prove_columns` has chosen it; None where they
    have to go one by one.
    """

    def __init__(
        self, product: Run, inputs: Sequence[Tensor], v: Sequence[Tensor], *, compiler: bool
    ) -> None:
        graph = simplify(trace(product, [*inputs, *v]), len(inputs))
        values = (node.meta.get("val") for node in graph.graph.nodes)
        self.tolerance = reordered(rounding(v for v in values if isinstance(v, Tensor)))
        targets = {node.target for node in graph.graph.nodes}
        self.views_as_complex = torch.ops.aten.view_as_complex.default in targets
        prepare, self._product = split(graph, len(inputs))
        self.prepare: Run = prepare.forward
        self.run: Run | None = None
        self.proven = False
        self._compiler = compiler
        self.run_columns: Run | None = None
        self.columns_proven = False

    def prove(
        self,
        residuals: Sequence[Tensor],
        v: Sequence[Tensor],
        expected: Sequence[Tensor],
        again: Callable[[], Sequence[Tensor]],
    ) -> list[str]:
        """Choose the fastest implementation that gives the right product; return the complaints.

        ``again()`` is what is expected at the next point, for what is nothing but rounding.
        """
        ways, complaints = self._implementations(self._product, [*residuals, *v])
        seconds: dict[Run, float] = {}
        for name, way in ways.items():
            try:
                right = agree(way(*residuals, *v), expected, self.tolerance, again)
            except Exception as error:  # a shape or a layout that the graph was not made for
                complaints.append(f"the {name} product failed ({first_line(error)})")
                continue
            if right:
                seconds[way] = _seconds(way, [*residuals, *v]) if len(ways) > 1 else 0.0
            else:
                complaints.append(f"the {name} product disagreed with the strategy's")
        self.run = min(seconds, key=seconds.__getitem__, default=None)
        self._compiler = self._compiler and self.run is ways.get("compiled")
        self.proven = True
        return complaints

    def prove_columns(self, residuals: Sequence[Tensor], V: Sequence[Tensor]) -> list[str]:
        """Set `run_columns` for blocks as wide as V, if it agrees with `run`; return the complaints."""
        assert self.run is not None
        k = V[0].shape[0]
        self.columns_proven = True
        try:
            way = self._vectorized(residuals, V)
            result = way(*residuals, *V)
        except Exception as error:  # an op that torch.vmap cannot batch
            return [f"columns go one by one ({first_line(error)})"]
        # A combination of the products is the product of the same combination.
        run = self.run
        expected = run(*residuals, *map(_combined, V))
        apart = [run(*residuals, *(column[i] for column in V)) for i in range(2)]

        def again() -> list[Tensor]:  # of a sum, by two products
            both = run(*residuals, *(column[0] + column[1] for column in V))
            return [e + (a + b - c) for e, a, b, c in zip(expected, *apart, both, strict=True)]

        found = [_combined(column) for column in result]
        if not agree(found, expected, self.tolerance, again):
            return ["the product of several columns disagreed with that of one"]
        one = _seconds(self.run, [*residuals, *(column[0] for column in V)])
        if _seconds(way, [*residuals, *V]) < k * one:  # not so for convolutions, on a CPU
            self.run_columns = way
        return []

    def _vectorized(self, residuals: Sequence[Tensor], V: Sequence[Tensor]) -> Run:
        n = len(V)
        axes = (*[None] * len(residuals), *[0] * n)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a loop inside, where an op has no batching rule
            batched = trace(torch.vmap(self._product, in_dims=axes), [*residuals, *V])
        prepare, product = split(simplify(batched, len(residuals)), len(residuals))
        prepared = prepare.forward(*residuals)
        ways, _ = self._implementations(product, [*prepared, *V])
        *_, way = ways.values()

        def run(*arguments: Tensor) -> Sequence[Tensor]:
            return way(*prepare.forward(*arguments[:-n]), *arguments[-n:])

        return run

    def _implementations(
        self, product: fx.GraphModule, arguments: Sequence[Tensor]
    ) -> tuple[dict[str, Run], list[str]]:
        ways = {"traced": _interpreted(product)}
        if self._compiler:
            try:
                ways["compiled"] = _compiled(product, arguments)
            except Exception as error:  # no C++ compiler, an op it does not know, a bug of its own
                return ways, [f"the compiler failed ({first_line(error)})"]
        return ways, []


def _interpreted(product: fx.GraphModule) -> Run:
    copy = _copy(product)
    fuse_additions(copy)
    reuse_buffers(copy)
    return copy.forward


def _compiled(product: fx.GraphModule, arguments: Sequence[Tensor]) -> Run:
    # Not torch.compile: the graph is traced already, and checking the guards on some hundred
    # arguments at every call costs more than a small product.
    copy = _copy(product)
    spell_out_scales(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch
        run: Run = _torch.inductor_compile()(copy, list(arguments))
    return run


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """To be made into an implementation, in the order that all of them run in."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    copy = fx.GraphModule(graph_module, graph)
    wait_for_readers(copy)
    return copy


def _seconds(run: Run, arguments: Sequence[Tensor]) -> float:
    """The best time of the calls that fit into a twentieth of a second; of one at least."""
    best, begin = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - begin < 0.05:
        start = time.perf_counter()
        device = run(*arguments)[0].device
        _torch.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _combined(columns: Tensor) -> Tensor:
    weights = torch.arange(1, columns.shape[0] + 1, dtype=torch.float64).cos()
    combined: Tensor = torch.tensordot(weights.to(columns), columns, dims=1)
    return combined


def first_line(error: Exception) -> str:
    """An error in a few words."""
    if "data-dependent" in str(error):
        return "it branches on the values of tensors"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
