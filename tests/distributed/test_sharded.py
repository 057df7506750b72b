"""Solvers and estimates with vectors in parts: what they find does not depend on how many parts."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from hvpop import Diagonal, Identity, LowRank, solvers, spectrum
from hvpop.distributed import Sharded, Team

from . import worlds

N = 301  # which two processes do not divide


def operators(team: Team) -> tuple[Any, Any, torch.Tensor]:
    """A positive definite one, an indefinite one that is far from singular, and right-hand sides in parts."""
    generator = torch.Generator().manual_seed(0)
    d = torch.linspace(0.5, 2, N, dtype=torch.float64)
    U = torch.randn(N, 6, dtype=torch.float64, generator=generator)
    S = Sharded(Diagonal(d) + LowRank(U, torch.arange(1.0, 7.0, dtype=torch.float64)), team)
    V = torch.randn(N, 3, dtype=torch.float64, generator=generator)
    # but for six eigenvalues of hundreds between -2 and -1/2
    return S, S + (-2.5) * Identity.like(S), S.space.own(V)


def found(team: Team) -> dict[str, Any]:
    A, indefinite, B = operators(team)
    whole = A.space.whole
    tight: dict[str, Any] = {"rtol": 1e-10}
    results: dict[str, Any] = {}
    for name, result in {
        "cg": solvers.cg(A, B, **tight),
        "block_cg": solvers.block_cg(A, B, **tight),
        "minres": solvers.minres(indefinite, B, **tight),
        "lsmr": solvers.lsmr(A, B, damping=1e-3, rtol=1e-8),
    }.items():
        assert result.converged, (name, result.status)
        results[name] = whole(result.x).numpy(), result.products
    pairs = spectrum.eigsh(A, 4, rtol=1e-10)
    assert pairs.status == "converged"
    vectors = whole(pairs.eigenvectors)
    results["eigsh"] = (
        pairs.eigenvalues[None].numpy(),
        pairs.products,
    )
    results["eigenvectors"] = (vectors * vectors[:1].sign()).numpy(), pairs.products
    estimate: dict[str, Any] = {"max_products": 90, "rtol": None, "seed": 3}
    for method in ("hutchinson", "xtrace", "hutch++"):
        value = spectrum.trace(A, method=method, **estimate)
        results[f"trace by {method}"] = (
            np.array([value.value, value.low, value.high]),
            value.products,
        )
    for method in ("hutchinson", "xdiag"):
        diagonal = spectrum.diagonal(A, method=method, **estimate)
        parts = torch.stack([diagonal.value, diagonal.high], 1)
        results[f"diagonal by {method}"] = whole(parts).numpy(), diagonal.products
    logdet = spectrum.logdet(A, max_products=90, seed=3)
    results["logdet"] = np.array([logdet.value, logdet.low, logdet.high]), logdet.products
    density = spectrum.spectral_density(A, max_products=60, steps=20, seed=3)
    results["spectral_density"] = density.value.numpy(), density.products
    return results


@cache
def at(ranks: int) -> list[dict[str, Any]]:
    return worlds.all_of(found, ranks)


TOLERANCES = {
    "lsmr": 1e-4,  # the gradient to 1e-8, at a condition of 3,500: its square at worst
    "logdet": 1e-6,  # the end of the interval comes of the smallest Ritz value, which is not converged
}

NAMES = [
    "cg", "block_cg", "minres", "lsmr", "eigsh", "eigenvectors", "trace by hutchinson",
    "trace by xtrace", "trace by hutch++", "diagonal by hutchinson", "diagonal by xdiag", "logdet",
    "spectral_density",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_find_what_one_finds(name: str) -> None:
    alone, products = at(1)[0][name]
    first, other = at(2)
    atol = TOLERANCES.get(name, 1e-8) * abs(alone).max()
    np.testing.assert_allclose(first[name][0], alone, rtol=0, atol=atol)
    assert abs(first[name][1] - products) <= 0.1 * products  # another order of sums
    np.testing.assert_array_equal(other[name][0], first[name][0])  # the same bits


def test_systems_are_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.linspace(0.5, 2, N, dtype=torch.float64)
    U = torch.randn(N, 6, dtype=torch.float64, generator=generator)
    M = torch.diag(d) + (U * torch.arange(1.0, 7.0, dtype=torch.float64)) @ U.T
    B = torch.randn(N, 3, dtype=torch.float64, generator=generator)
    x = torch.linalg.solve(M, B).numpy()
    for name in ("cg", "block_cg"):
        np.testing.assert_allclose(at(2)[0][name][0], x, rtol=0, atol=1e-8 * abs(x).max())
    largest = torch.linalg.eigvalsh(M)[-4:].numpy()
    np.testing.assert_allclose(at(2)[0]["eigsh"][0][0], largest, rtol=1e-10)


LONG = 2_000_000  # entries; forty vectors of them take 305 MiB, beside which pages half full are little


def peak(team: Team) -> float:
    """MiB beside what was there before that `eigsh` with forty vectors takes at most."""
    import psutil

    with contextlib.suppress(
        OSError, AttributeError
    ):  # what is freed goes back to the system at once
        ctypes.CDLL(None).mallopt(
            -3, 1 << 20
        )  # M_MMAP_THRESHOLD, which else grows to what was freed
    D = Diagonal(torch.linspace(1, 2, LONG))
    A: Any = Sharded(D, team) if team.size > 1 else D
    process = psutil.Process()
    highest, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            highest[0] = max(highest[0], float(process.memory_info().rss))
            time.sleep(0.002)

    spectrum.eigsh(A, 2, basis=40, max_products=2)  # what is loaded and kept at the first use
    before = float(process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    found = spectrum.eigsh(A, 2, basis=40, max_products=42)
    over.set()
    watcher.join()
    assert found.products >= 40
    return (highest[0] - before) / 2**20


@cache
def peak_of_one() -> float:
    return worlds.all_of(peak, 1)[0]


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.55), (4, 0.3)])
def test_a_process_keeps_its_share_of_the_basis_and_two_whole_vectors(
    ranks: int, share: float
) -> None:
    # with the block at work and its product 12.3 of 43.5 vectors for four, and pages that are not full
    assert np.mean(worlds.all_of(peak, ranks)) <= share * peak_of_one()
