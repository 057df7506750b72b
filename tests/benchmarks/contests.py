"""The questions put to every entrant; each answer's error stands beside its time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import ours
import peers
import torch
import workloads
from entrants import Entrant, Product
from scipy.sparse.linalg import LinearOperator, eigsh
from timing import Clock, Samples, interleaved
from workloads import Limit, Workload, graph_bytes, in_float64, limit, true_product

ROUNDING = 1e-4
"""A product in float32 with a larger relative error is wrong, not rounded."""

COLUMNS = 16


@dataclass(frozen=True)
class Plan:
    """How a run is done."""

    repeats: int = 15
    clock: Clock = time.perf_counter
    compiler: bool = True
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # of the scaling plot


@dataclass(frozen=True)
class Row:
    """One entrant's answer to one question."""

    workload: str
    question: str
    entrant: str
    ours: bool
    keeps: bool
    status: str  # "right", "wrong", "not installed", "fails: ..."
    error: float | None = None  # relative, against float64
    setup: float | None = None  # seconds until the first answer
    seconds: Samples | None = None
    unit: Samples | None = None  # what `ratio` is a ratio to, from the same rounds
    limit: float | None = None  # of the arithmetic, as a ratio

    @property
    def right(self) -> bool:
        return self.status == "right"

    @property
    def ratio(self) -> float | None:
        both = self.seconds and self.unit
        return self.seconds.in_units_of(self.unit) if both else None

    @property
    def least_ratio(self) -> float | None:
        both = self.seconds and self.unit
        return self.seconds.least / self.unit.least if both else None

    def record(self) -> dict[str, Any]:
        derived: dict[str, Any] = {"ratio": self.ratio, "least_ratio": self.least_ratio}
        if self.seconds is not None:
            derived |= {"median": self.seconds.median, "least": self.seconds.least}
        return asdict(self) | derived

    @staticmethod
    def restored(record: dict[str, Any]) -> Row:
        """The row of a `record`."""
        given = {field.name: record[field.name] for field in fields(Row)}
        for name in ("seconds", "unit"):
            if given[name] is not None:
                given[name] = Samples(tuple(given[name]["seconds"]))
        return Row(**given)


@dataclass(frozen=True)
class Attempt:
    """An entrant that has answered once: what it said, how wrong that is, how to ask it again."""

    entrant: Entrant
    status: str
    error: float | None = None
    setup: float | None = None
    again: Callable[[], object] | None = None


def attempted(
    entrant: Entrant,
    prepare: Callable[[], Callable[[], Any]],
    error_of: Callable[[Any], float],
    tolerance: float,
) -> Attempt:
    """Build an entrant, ask it once, and judge the answer; what it raises is its status."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if entrant.ours else "ignore")
            ask = prepare()
            answer = ask()
    except peers.NotInstalledError:
        return Attempt(entrant, "not installed")
    except Exception as problem:
        return Attempt(entrant, f"fails: {type(problem).__name__}: {str(problem)[:120]}")
    setup = time.perf_counter() - start
    error = error_of(answer)
    return Attempt(entrant, "right" if error <= tolerance else "wrong", error, setup, ask)


def timed(
    workload: str,
    question: str,
    attempts: Sequence[Attempt],
    plan: Plan,
    unit: Callable[[], object] | None = None,
    per: int = 1,
    limits: Limit | None = None,
) -> list[Row]:
    """Time the attempts in the same rounds as the unit; ``per`` answers are one call."""
    calls = {a.entrant.name: a.again for a in attempts if a.again is not None}
    if unit is not None:
        calls["unit"] = unit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = interleaved(calls, repeats=plan.repeats, clock=plan.clock)
    rows = []
    for a in attempts:
        seconds = samples.get(a.entrant.name)
        if seconds is not None:
            seconds = Samples(tuple(s / per for s in seconds.seconds))
        bound = None
        if limits is not None:
            bound = limits.kept if a.entrant.keeps else limits.live
        row = Row(workload, question, a.entrant.name, a.entrant.ours, a.entrant.keeps, a.status)
        rows.append(
            replace(
                row,
                error=a.error,
                setup=a.setup,
                seconds=seconds,
                unit=samples.get("unit"),
                limit=bound,
            )
        )
    return rows


# -- one product, and sixteen ----------------------------------------------------------------------


def one_product(workload: Workload, plan: Plan) -> list[Row]:
    entrants = (ours.LIVE, *_kept(plan), *peers.PEERS)
    return product_among(entrants, workload, plan, "one product")


def product_among(
    entrants: Sequence[Entrant], workload: Workload, plan: Plan, question: str
) -> list[Row]:
    v = workload.vectors()
    truth = true_product(workload, v)
    attempts = [_multiplying(e, workload, v, truth, "vector") for e in entrants]
    unit = peers.gradient(workload)
    return timed(workload.name, question, attempts, plan, unit, limits=limit(workload))


def gauss_newton(workload: Workload, plan: Plan) -> list[Row]:
    """The same of the Gauss-Newton matrix."""
    v = workload.vectors()
    truth = true_product(workload, v, workloads.gauss_newton)
    entrants = (*ours.GAUSS_NEWTON, *peers.GAUSS_NEWTON)
    attempts = [_multiplying(e, workload, v, truth, "vector") for e in entrants]
    unit, limits = peers.gradient(workload), limit(workload, workloads.gauss_newton)
    return timed(workload.name, "Gauss-Newton, one product", attempts, plan, unit, limits=limits)


def sixteen_columns(workload: Workload, plan: Plan) -> list[Row]:
    """The cost of one column of sixteen."""
    V = workload.vectors(COLUMNS)
    truth = true_product(workload, V)
    attempts = [
        _multiplying(e, workload, V, truth, "columns") for e in (*_kept(plan), *peers.PEERS)
    ]
    unit, question = peers.gradient(workload), f"a column of {COLUMNS}"
    return timed(workload.name, question, attempts, plan, unit, COLUMNS, limit(workload))


def within_memory(workload: Workload, plan: Plan) -> list[Row]:
    """One product with room for half of what the graphs keep, against peers that keep nothing."""
    budget = graph_bytes(workload) // 2
    v = workload.vectors()
    truth = true_product(workload, v)
    entrants = [
        Entrant(e.name, True, partial(e.build, memory=budget), ours=True) for e in _kept(plan)
    ]
    entrants += [e for e in peers.PEERS if not e.keeps]
    attempts = [_multiplying(e, workload, v, truth, "vector") for e in entrants]
    question = f"one product, keeping at most {budget / 2**20:.0f} MiB"
    unit = peers.gradient(workload)
    return timed(workload.name, question, attempts, plan, unit, limits=limit(workload))


def _kept(plan: Plan) -> tuple[Entrant, ...]:
    return (*ours.KEPT, ours.COMPILED) if plan.compiler else ours.KEPT


def _multiplying(
    entrant: Entrant, workload: Workload, V: torch.Tensor, truth: torch.Tensor, how: str
) -> Attempt:
    def prepare() -> Callable[[], torch.Tensor]:
        multiply = getattr(entrant.build(workload), how)
        return lambda: multiply(V)

    def error(product: torch.Tensor) -> float:
        return float((product.detach().double() - truth).norm() / truth.norm())

    return attempted(entrant, prepare, error, ROUNDING)


# -- from a DataLoader to eigenvalues --------------------------------------------------------------

EIGENVALUES = 10


def end_to_end(workload: Workload, plan: Plan) -> list[Row]:
    """Operator, whatever it prepares, and the ten largest eigenvalues by SciPy, all timed."""
    truth = largest_eigenvalues(workload, EIGENVALUES)

    def error(found: np.ndarray) -> float:
        return float(np.abs(np.sort(found) - truth).max() / truth.max())

    attempts = [
        attempted(e, lambda e=e: partial(_eigenvalues, e, workload), error, ROUNDING)
        for e in (*ours.KEPT, *peers.PEERS)
    ]
    unit = peers.gradient(workload)
    question = f"{EIGENVALUES} eigenvalues by SciPy, end to end"
    return timed(workload.name, question, attempts, plan, unit)


def largest_eigenvalues(workload: Workload, k: int) -> np.ndarray:
    """In float64, by ARPACK on the product by hand."""
    model, data = in_float64(workload)
    double = Workload(workload.name, workload.title, model, workload.loss, data)
    return np.sort(_scipy_eigenvalues(peers.by_hand_kept(double), workload.parameters, k, "f8"))


def _eigenvalues(entrant: Entrant, workload: Workload) -> np.ndarray:
    return _scipy_eigenvalues(entrant.build(workload), workload.parameters, EIGENVALUES, "f4")


def _scipy_eigenvalues(product: Product, n: int, k: int, dtype: str) -> np.ndarray:
    A = as_scipy(product, n, dtype)
    start = np.random.default_rng(0).standard_normal(n).astype(dtype)
    return eigsh(A, k=k, which="LA", v0=start, return_eigenvectors=False)


def as_scipy(product: Product, n: int, dtype: str = "f4") -> Any:
    """The operator that a library gives SciPy, or its product wrapped as one."""
    if product.scipy is not None:
        return product.scipy

    def matvec(v: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.ascontiguousarray(v.reshape(-1), dtype=dtype))
        return product.vector(v).detach().numpy()

    return LinearOperator((n, n), matvec=matvec, dtype=dtype)
