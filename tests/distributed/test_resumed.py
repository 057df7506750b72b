"""Checkpoints of vectors in parts: the bits of an undisturbed run, for any number of processes later."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvpop import FromFunction, solvers, spectrum
from hvpop.distributed import Sharded, Team
from hvpop.operators import checkpoint

from . import worlds
from .test_sharded import N

RUNS: dict[str, Any] = {
    "eigsh": lambda A, **kw: spectrum.eigsh(A, 3, basis=12, rtol=1e-8, **kw),
    "eigsh in blocks": lambda A, **kw: spectrum.eigsh(A, 3, block=2, rtol=1e-8, **kw),
    "density": lambda A, **kw: spectrum.spectral_density(A, steps=20, seed=3, **kw),
    "logdet": lambda A, **kw: spectrum.logdet(A, rtol=None, seed=3, **kw),
}
RUNS |= {
    f"trace by {method}": lambda A, method=method, **kw: spectrum.trace(
        A, method=method, rtol=None, block=4, seed=3, **kw
    )
    for method in ("hutchinson", "xtrace")
}
RUNS |= {
    f"diagonal by {method}": lambda A, method=method, **kw: spectrum.diagonal(
        A, method=method, rtol=None, block=4, seed=3, **kw
    )
    for method in ("hutchinson", "xdiag")
}
PRODUCTS = 40


def solver(name: str, **options: Any) -> Any:
    def run(A: Any, max_products: int, **kw: Any) -> Any:
        b = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        return getattr(solvers, name)(A, A.space.own(b), **{"rtol": 1e-8, **options}, **kw)

    return run


RUNS |= {name: solver(name) for name in ("cg", "block_cg", "minres")}
RUNS["lsmr"] = solver("lsmr", damping=0.5, rtol=1e-6)


class StoppedError(Exception):
    """Instead of a kill, which takes a process each time."""


def operator(team: Team, passes: list[int], last: float) -> Sharded:
    """A matrix that counts passes, and fails after some."""
    M = torch.diag(torch.linspace(0.5, 2, N, dtype=torch.float64))
    U = 0.1 * torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M += (U * torch.arange(1.0, 7.0, dtype=torch.float64)) @ U.T

    def product(V: torch.Tensor) -> torch.Tensor:
        passes[0] += 1
        if passes[0] > last:
            raise StoppedError
        return M @ V

    return Sharded(FromFunction(product, M.shape, dtype=M.dtype, symmetric=True), team)


def found(result: Any, whole: Any) -> np.ndarray:
    if hasattr(result, "eigenvalues"):
        v = whole(result.eigenvectors)
        return torch.cat([result.eigenvalues[None], v * v[:1].sign()]).numpy()
    if hasattr(result, "x"):
        return whole(result.x).numpy()
    value = torch.as_tensor(result.value).reshape(-1)
    return (
        whole(value[:, None]) if result.__class__.__name__ == "DiagonalEstimate" else value
    ).numpy()


def runs(
    team: Team, folder: str | None, last: dict[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """What each computation finds in how many passes, saved after every step if it is to fail."""
    if last:
        checkpoint._PAUSE, checkpoint._SHARE = 0.0, 1e9
    results, counts = {}, {}
    for name, run in RUNS.items():
        saved = {} if folder is None else {"checkpoint": Path(folder) / name}
        passes = [0]
        A = operator(team, passes, last.get(name, np.inf))
        try:
            results[name] = found(run(A, max_products=PRODUCTS, **saved), A.space.whole)
        except StoppedError:
            assert last
        counts[name] = passes[0]
    return results, counts


def test_a_run_of_four_processes_goes_on_with_four_to_the_same_bits_and_with_fewer(
    tmp_path: Path,
) -> None:
    expected, counts = worlds.all_of(runs, 4, None, {})[0]
    last = {name: count // 2 + 1 for name, count in counts.items()}  # one tells the operator
    (left := tmp_path / "left").mkdir()
    assert worlds.all_of(runs, 4, str(left), last)[0][0] == {}
    for ranks in (4, 3, 2, 1):
        folder = shutil.copytree(left, tmp_path / str(ranks))
        for others, passes in worlds.all_of(runs, ranks, str(folder), {}):
            for name, value in expected.items():
                assert passes[name] < 0.8 * counts[name], name
                if ranks == 4:
                    np.testing.assert_array_equal(others[name], value, name)
                atol = (1e-4 if name == "lsmr" else 1e-6) * abs(
                    value
                ).max()  # as they are asked for
                np.testing.assert_allclose(others[name], value, rtol=0, atol=atol, err_msg=name)
