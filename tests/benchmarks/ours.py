"""hvpop's ways of making products."""

from __future__ import annotations

from entrants import Entrant, Product
from workloads import Workload

from hvpop import HessianOperator, LinearOperator
from hvpop.strategies import Compiled, HVPStrategy


def operator(workload: Workload, strategy: HVPStrategy | None = None) -> HessianOperator:
    return HessianOperator(workload.fresh(), workload.loss, workload.data, strategy=strategy)


def live(workload: Workload) -> Product:
    return _product(operator(workload))


def linearized(workload: Workload, memory: int | None = None) -> Product:
    return _product(operator(workload).linearize(memory=memory))


def split(workload: Workload, memory: int | None = None) -> Product:
    return _product(operator(workload, Compiled(compiler=False)).linearize(memory=memory))


def compiled(workload: Workload, memory: int | None = None) -> Product:
    return _product(operator(workload, Compiled()).linearize(memory=memory))


def _product(A: LinearOperator) -> Product:
    return Product(A.matvec, A.matmat, scipy=A, own=A)


LIVE = Entrant("hvpop", False, live, ours=True)
KEPT = (
    Entrant("hvpop, linearized", True, linearized, ours=True),
    Entrant("hvpop, Compiled without compiler", True, split, ours=True),
)
COMPILED = Entrant("hvpop, Compiled", True, compiled, ours=True)
