"""A program: a traced product, split into what runs once per point and what runs once per vector."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from .buffers import fuse_additions, reuse_buffers, spell_out_scales
from .simplifying import simplify
from .splitting import split
from .tracing import trace

Run = Callable[..., Sequence[Tensor]]
"""``run(*residuals, *v)``: the product, tensor by tensor."""


class Program:
    """``product(*inputs, *v)``, traced for inputs of certain shapes, dtypes and strides.

    `prepare` maps the inputs to the residuals: all that the product needs besides v. `run` maps
    residuals and v to the product, once `prove` has chosen it; None if nothing was right.
    """

    def __init__(
        self, product: Run, inputs: Sequence[Tensor], v: Sequence[Tensor], *, compiler: bool
    ) -> None:
        graph = simplify(trace(product, [*inputs, *v]), len(inputs))
        prepare, self._product = split(graph, len(inputs))
        self.prepare: Run = prepare.forward
        self.run: Run | None = None
        self.proven = False
        self._compiler = compiler
        self._columns: dict[int, Run | None] = {}

    def prove(
        self, residuals: Sequence[Tensor], v: Sequence[Tensor], is_right: Callable[..., bool]
    ) -> list[str]:
        """Choose the fastest implementation that gives the right product; return the complaints."""
        ways, complaints = self._implementations(self._product, [*residuals, *v])
        seconds: dict[Run, float] = {}
        for name, way in ways.items():
            if is_right(way(*residuals, *v)):
                seconds[way] = _seconds(way, [*residuals, *v]) if len(ways) > 1 else 0.0
            else:
                complaints.append(f"the {name} product disagreed with the strategy's")
        self.run = min(seconds, key=seconds.__getitem__, default=None)
        self._compiler = self._compiler and self.run is ways.get("compiled")
        self.proven = True
        return complaints

    def columns(
        self, residuals: Sequence[Tensor], V: Sequence[Tensor], is_right: Callable[..., bool]
    ) -> tuple[Run | None, list[str]]:
        """The product for as many columns as V has, proven too; None where it has to be a loop."""
        k = V[0].shape[0]
        complaints: list[str] = []
        if k not in self._columns:
            self._columns[k] = None
            try:
                way = self._vectorized(residuals, V)
            except Exception as error:  # an op that torch.vmap cannot batch
                complaints.append(f"columns go one by one ({first_line(error)})")
            else:
                if is_right(way(*residuals, *V)):
                    self._columns[k] = way
                else:
                    complaints.append(
                        "the product of several columns disagreed with the single one"
                    )
        return self._columns[k], complaints

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
    run: Run = torch._inductor.compile(copy, list(arguments))
    return run


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def _seconds(run: Run, arguments: Sequence[Tensor]) -> float:
    """The best time of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def first_line(error: Exception) -> str:
    """An error in a few words."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
