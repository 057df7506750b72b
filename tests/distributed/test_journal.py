"""A solver that is killed goes on from the products that were written down."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as ssl
import torch
from torch import nn

from hvpop import Dense, HessianOperator
from hvpop.distributed import DataParallel, Journal, Team

from . import problems, worlds


def matrix(seed: int = 0) -> Dense:
    A = torch.randn(30, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Dense(A + A.T, symmetric=True)


def solved(A: Any) -> np.ndarray:
    found: np.ndarray = ssl.eigsh(A, k=2, v0=np.ones(A.shape[0]), return_eigenvectors=False)
    return found


class Dying(Journal):
    """Fails at a product."""

    at = 7

    def _apply(self, V: torch.Tensor) -> torch.Tensor:
        if self.made + self.repeated == self.at:
            raise ConnectionError("gone")
        return super()._apply(V)


def test_a_solver_resumes_and_gives_the_same_bits(tmp_path: Path) -> None:
    expected = solved(matrix())
    with pytest.raises(ConnectionError):
        solved(Dying(matrix(), tmp_path))
    again = Journal(matrix(), tmp_path)
    assert (solved(again) == expected).all()
    assert again.repeated == Dying.at
    assert again.made > 0
    once_more = Journal(matrix(), tmp_path)
    assert (solved(once_more) == expected).all()
    assert once_more.made == 0
    assert "0 products made" in once_more.report()
    assert not list(tmp_path.glob("*.partial"))


def test_columns_and_transposes_have_entries_of_their_own(tmp_path: Path) -> None:
    M = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = Journal(Dense(M), tmp_path)
    V, U = torch.eye(3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(A @ V, M)
        assert torch.equal(A.T @ U, M.T)
        assert torch.equal(A @ V[:, 0], M[:, 0])
    assert A.made == A.repeated == 8


def test_a_directory_of_another_matrix_is_refused(tmp_path: Path) -> None:
    Journal(matrix(), tmp_path)
    with pytest.raises(ValueError, match="of another matrix; pass a directory of its own"):
        Journal(matrix(1), tmp_path)


def killed(team: Team, path: str, at: int) -> np.ndarray:
    H = DataParallel(
        HessianOperator(
            problems.model(), nn.CrossEntropyLoss(), problems.held("ragged", team.rank, team.size)
        )
    )

    def work(A: Any) -> np.ndarray:
        journal = Journal(A, path)

        def product(v: Any) -> Any:
            if at and journal.made + journal.repeated >= at:
                os.kill(os.getpid(), signal.SIGKILL)
            return journal @ v

        plain = ssl.LinearOperator(A.shape, matvec=product, dtype=A.dtype)
        return solved(plain)

    return H.drive(work)


def test_a_leader_that_is_killed_goes_on_from_its_journal(tmp_path: Path) -> None:
    (expected, _) = worlds.all_of(killed, 2, str(tmp_path / "whole"), 0)
    for at in (5, 9):
        leader, other = worlds.run(killed, 2, str(tmp_path / "killed"), at)
        assert leader.killed
        assert other.error == "RankLost"
    for found in worlds.all_of(killed, 2, str(tmp_path / "killed"), 0):
        np.testing.assert_array_equal(found, expected)
