"""A solver that was stopped goes on from its checkpoint, to the bits that it would have found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvpop import Dense, Diagonal, FromFunction, LinearOperator, solvers
from hvpop.operators import checkpoint as files

N, K = 90, 3
F64 = torch.float64


def symmetric(low: float) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(N, N, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    matrix: torch.Tensor = (Q * torch.linspace(low, 3, N, dtype=F64)) @ Q.T
    return (matrix + matrix.T) / 2


POSITIVE, INDEFINITE = symmetric(0.05), symmetric(-1.0)
TALL = torch.randn(N + 20, N, dtype=F64, generator=torch.Generator().manual_seed(1))
B = torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(2)) * torch.tensor(
    [1.0, 1e3, 1e-3], dtype=F64
)
X0 = torch.ones(N, K, dtype=F64)
M = Diagonal(torch.linspace(1, 2, N, dtype=F64))

RUNS: dict[str, tuple[torch.Tensor, Callable[..., Any]]] = {
    "cg": (POSITIVE, lambda A, **kw: solvers.cg(A, B, **kw)),
    "cg of a vector": (POSITIVE, lambda A, **kw: solvers.cg(A, B[:, 0], **kw)),
    "cg, preconditioned": (
        POSITIVE,
        lambda A, **kw: solvers.cg(A, B, x0=X0, preconditioner=M, **kw),
    ),
    "block_cg": (POSITIVE, lambda A, **kw: solvers.block_cg(A, B, **kw)),
    "block_cg from x0": (POSITIVE, lambda A, **kw: solvers.block_cg(A, B, x0=X0, **kw)),
    "minres": (INDEFINITE, lambda A, **kw: solvers.minres(A, B, **kw)),
    "minres, preconditioned": (
        INDEFINITE,
        lambda A, **kw: solvers.minres(A, B, x0=X0, preconditioner=M, **kw),
    ),
    "lsmr": (TALL, lambda A, **kw: solvers.lsmr(A, torch.cat([B, B[:20]]), **kw)),
    "lsmr, damped": (
        TALL,
        lambda A, **kw: solvers.lsmr(A, torch.cat([B, B[:20]]), damping=0.1, x0=X0, **kw),
    ),
}


def watched(M: torch.Tensor, error: type[BaseException], last: float) -> tuple[Any, list[int]]:
    """An operator that counts its passes, and fails after some."""
    count = [0]

    def times(M: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def product(V: torch.Tensor) -> torch.Tensor:
            count[0] += 1
            if count[0] > last:
                raise error("stop")
            return M @ V

        return product

    square = M.shape[0] == M.shape[1]
    made: LinearOperator = FromFunction(
        times(M), tuple(M.shape), None if square else times(M.T), dtype=F64, symmetric=square
    )
    return made, count


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_solver_gives_the_bits_of_an_undisturbed_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.Checkpoint, "due", lambda self: True)
    matrix, run = RUNS[name]
    A, passes = watched(matrix, RuntimeError, torch.inf)
    expected = run(A, rtol=1e-9)
    assert expected.converged
    path = tmp_path / "state.pt"
    with pytest.raises(RuntimeError, match="stop"):
        run(watched(matrix, RuntimeError, passes[0] // 2)[0], rtol=1e-9, checkpoint=path)
    A, rest = watched(matrix, RuntimeError, torch.inf)
    resumed = run(A, rtol=1e-9, checkpoint=path)
    assert rest[0] < 0.7 * passes[0]
    assert resumed.status == expected.status
    for what in ("x", "history", "residual_norms"):
        assert torch.equal(
            getattr(resumed, what).nan_to_num(-1.0), getattr(expected, what).nan_to_num(-1.0)
        )
    assert (resumed.steps, resumed.products) == (expected.steps, expected.products)
    A, rest = watched(matrix, RuntimeError, torch.inf)
    again = run(A, rtol=1e-9, checkpoint=path)  # it is done
    assert rest[0] <= 2 + name.startswith("lsmr")
    assert torch.equal(again.x, expected.x)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_out_of_steps_goes_on_when_it_may(name: str, tmp_path: Path) -> None:
    matrix, run = RUNS[name]
    A = Dense(matrix, symmetric=matrix.shape[0] == matrix.shape[1])
    expected = run(A, rtol=1e-9)
    path = tmp_path / "state.pt"
    assert not run(A, rtol=1e-9, max_steps=7, checkpoint=path).converged
    assert torch.equal(run(A, rtol=1e-9, checkpoint=path).x, expected.x)


@pytest.mark.parametrize("name", RUNS)
def test_a_tightened_tolerance_goes_on_from_where_it_stands(name: str, tmp_path: Path) -> None:
    matrix, run = RUNS[name]
    A, passes = watched(matrix, RuntimeError, torch.inf)
    fresh = run(A, rtol=1e-9)
    path = tmp_path / "state.pt"
    run(watched(matrix, RuntimeError, torch.inf)[0], rtol=1e-4, checkpoint=path)
    A, rest = watched(matrix, RuntimeError, torch.inf)
    tight = run(A, rtol=1e-9, checkpoint=path)
    assert tight.converged
    assert rest[0] < passes[0]
    error = (tight.x - fresh.x).norm(dim=0) / fresh.x.norm(dim=0)
    assert float(error.max()) < 2e-9 * 3 / 0.05  # by the condition, from either side


@pytest.mark.parametrize("name", RUNS)
def test_what_ctrl_c_leaves_is_gone_on_from(name: str, tmp_path: Path) -> None:
    matrix, run = RUNS[name]
    path = tmp_path / "state.pt"
    raised: list[int] = []

    def stop(step: Any) -> None:
        if step.number == 6 and not raised:
            raised.append(1)
            raise KeyboardInterrupt

    A = Dense(matrix, symmetric=matrix.shape[0] == matrix.shape[1])
    stopped = run(A, rtol=1e-9, callback=stop, checkpoint=path)
    assert "interrupted" in stopped.status
    resumed = run(A, rtol=1e-9, checkpoint=path)
    assert resumed.converged
    assert resumed.steps > 6


def test_another_system_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    A = Dense(POSITIVE, symmetric=True)
    solvers.cg(A, B, preconditioner=M, max_steps=3, checkpoint=path)
    for other in (
        lambda: solvers.cg(A, 2 * B, preconditioner=M, checkpoint=path),
        lambda: solvers.cg(A, B, x0=X0, preconditioner=M, checkpoint=path),
        lambda: solvers.cg(A, B, checkpoint=path),
        lambda: solvers.cg(A, B, preconditioner=2 * M, checkpoint=path),
        lambda: solvers.minres(A, B, checkpoint=path),
        lambda: solvers.cg(2 * A, B, preconditioner=M, checkpoint=path),
        lambda: solvers.lsmr(A, B, damping=0.1, checkpoint=path),
    ):
        with pytest.raises(ValueError, match=r"belongs to another (operator|computation)"):
            other()
    assert solvers.cg(A, B, preconditioner=M, checkpoint=path).converged
