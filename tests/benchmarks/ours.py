"""hvpop's ways of making products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from entrants import Entrant, Product
from workloads import Workload

from hvpop import GaussNewtonOperator, HessianOperator, LinearOperator
from hvpop.strategies import Compiled, HVPStrategy

Kind = type[HessianOperator] | type[GaussNewtonOperator]


def operator(
    workload: Workload, strategy: HVPStrategy | None = None, kind: Kind = HessianOperator
) -> HessianOperator | GaussNewtonOperator:
    return kind(workload.fresh(), workload.loss, workload.data, strategy=strategy)


def live(workload: Workload, kind: Kind = HessianOperator) -> Product:
    return _product(operator(workload, kind=kind))


def linearized(
    workload: Workload, memory: int | None = None, kind: Kind = HessianOperator
) -> Product:
    return _product(operator(workload, kind=kind).linearize(memory=memory))


def split(workload: Workload, memory: int | None = None, kind: Kind = HessianOperator) -> Product:
    return _product(operator(workload, Compiled(compiler=False), kind).linearize(memory=memory))


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

GAUSS_NEWTON = tuple(
    replace(e, build=partial(e.build, kind=GaussNewtonOperator)) for e in (LIVE, *KEPT)
)
