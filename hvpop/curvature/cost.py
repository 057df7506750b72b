"""What products will cost, told before they are asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

import torch

from ..operators import LinearOperator
from ..operators.crossing import working_dtype
from ..operators.wording import counted
from ..risk import EmpiricalRisk, Term
from ..risk.batches import tensors_in
from ..strategies import HVPStrategy, Params
from ..strategies.base import grad_enabled
from .memory import budget_in_bytes, graph_bytes


@dataclass(frozen=True)
class Cost:
    """What the products of an operator take; from its `cost`, prints as text."""

    parameters: int  # n, the entries of a vector
    batches: int  # that a pass over the data reads
    data_bytes: int  # of all of them
    kept_bytes: int | None  # what a linearized operator would keep at most; None: not known
    budget: int  # what it may keep by default, of the memory that is free now
    vector_bytes: int  # one vector of n
    seconds: float  # of a product, which is one pass over the data

    @property
    def fits(self) -> bool:
        """Whether all that products share can be kept, so that they read no data and build no graph."""
        return self.kept_bytes is not None and self.kept_bytes <= self.budget

    def estimate(self, products: int) -> float:
        """Seconds for so many products, at most: what is kept makes them cheaper."""
        return products * self.seconds

    def __str__(self) -> str:
        kept = "not known" if self.kept_bytes is None else in_bytes(self.kept_bytes)
        fits = "all of it fits" if self.fits else "not all of it fits"
        batches = "one batch" if self.batches == 1 else f"{self.batches} batches"
        return (
            f"{counted(self.parameters, 'parameter')}; a pass over the data reads {batches} of together "
            f"{in_bytes(self.data_bytes)}\n"
            f"a product is a pass, of {in_time(self.seconds)}; 100 products take at most "
            f"{in_time(self.estimate(100))}\n"
            f"memory to keep what products share: {kept} of {in_bytes(self.budget)} allowed, {fits}; "
            f"a vector: {in_bytes(self.vector_bytes)}"
        )


def cost(
    A: LinearOperator, risk: EmpiricalRisk, strategy: HVPStrategy, point: Params, state: Params
) -> Cost:
    """All but the seconds: one pass over the data, and a graph for each of the first two shapes."""
    held = 0
    sizes: list[tuple[int, int | None]] = []  # bytes of a batch, and of its graph where measured
    measured: dict[object, int | None] = {}
    with grad_enabled(), risk.place(point, state), closing(risk.terms()) as terms:
        for term in terms:
            tensors = list(tensors_in(term.data))
            shape = tuple((tuple(t.shape), t.dtype) for t in tensors if not t.is_nested)
            if shape not in measured and len(measured) < 2:
                known = [*point.values(), *state.values(), *tensors]
                measured[shape] = _graph(strategy, term, point, state, known)
            size = sum(t.nbytes for t in tensors)  # not of what they may be views of
            held += size
            sizes.append((size, measured.get(shape)))
    kept = _extrapolated(sizes)
    item = torch.empty(0, dtype=working_dtype(A.torch_dtype)).element_size()
    budget = budget_in_bytes(None, A.device)
    place = sum(t.nbytes for t in (*point.values(), *state.values()))
    # batches in memory already are copied where they are joined
    total = None if kept is None else kept + held + place
    n = A.shape[1]
    return Cost(n, len(sizes), held, total, budget, n * item, 0.0)


def timed(A: LinearOperator) -> float:
    """Seconds of a product: of the third one if the first two, which may prepare, were short."""
    v = torch.ones(A.shape[1], dtype=working_dtype(A.torch_dtype), device=A.device)
    seconds = 0.0
    for _ in range(3):
        start = time.perf_counter()
        float((A @ v).sum())
        seconds = time.perf_counter() - start
        if seconds > 10.0:
            break
    return seconds


def _graph(
    strategy: HVPStrategy,
    term: Term,
    point: Params,
    state: Params,
    known: Iterable[torch.Tensor],
) -> int | None:
    fixed = {name: p.detach().requires_grad_() for name, p in point.items()}
    try:
        return graph_bytes(
            lambda: strategy.plain.linearize(term.function, fixed, state, *term.data), known
        )
    except RuntimeError:  # functions that saved-tensor hooks cannot look into, or no derivative
        return None


def _extrapolated(sizes: list[tuple[int, int | None]]) -> int | None:
    """The graphs of all batches; of those that were not measured, by the size of their data."""
    known = [(data, graph) for data, graph in sizes if graph is not None]
    if not known:
        return None
    ratio = sum(graph for _, graph in known) / max(1, sum(data for data, _ in known))
    return int(sum(ratio * data if graph is None else graph for data, graph in sizes))


def in_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def in_time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
