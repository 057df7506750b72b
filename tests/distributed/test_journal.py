"""A solver that is killed goes on from the products that were written down."""

from __future__ import annotations

import os
import shutil
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
    assert not list(tmp_path.glob("*.tmp"))


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


@pytest.mark.parametrize("place", [0, 40, 0.3, 0.9, -1])
def test_a_damaged_product_is_made_again(place: float, tmp_path: Path) -> None:
    expected = solved(Journal(matrix(), tmp_path))
    for file in tmp_path.glob("*.pt"):
        if file.name != "matrix.pt":
            content = bytearray(file.read_bytes())
            content[int(place * len(content)) if 0 < place < 1 else int(place)] ^= 0x10
            file.write_bytes(content)
    again = Journal(matrix(), tmp_path)
    assert (solved(again) == expected).all()
    assert again.made > 0
    assert again.repeated == 0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_products_cut_short_are_made_again(share: float, tmp_path: Path) -> None:
    expected = solved(Journal(matrix(), tmp_path))
    for file in tmp_path.glob("*.pt"):
        if file.name != "matrix.pt":
            content = file.read_bytes()
            file.write_bytes(content[: int(share * len(content))])
    assert (solved(Journal(matrix(), tmp_path)) == expected).all()


@pytest.mark.parametrize("content", [b"", b"hi", None])
def test_a_journal_that_does_not_say_of_which_matrix_is_refused(
    content: bytes | None, tmp_path: Path
) -> None:
    solved(Journal(matrix(), tmp_path))
    file = tmp_path / "matrix.pt"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match=r"matrix\.pt is damaged, .* remove that directory"):
        Journal(matrix(), tmp_path)


def test_products_of_another_matrix_are_not_found_where_its_name_is_gone(tmp_path: Path) -> None:
    solved(Journal(matrix(), tmp_path))
    (tmp_path / "matrix.pt").unlink()
    expected = solved(matrix(1))
    assert (solved(Journal(matrix(1), tmp_path)) == expected).all()


def test_a_journal_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    expected = solved(matrix())
    journal = Journal(matrix(), tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    with pytest.warns(RuntimeWarning, match="Journal goes on, but .* cannot be written") as seen:
        assert (solved(journal) == expected).all()
    assert len(seen) == 1


def test_a_journal_writes_through_no_link_and_is_private(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "journal"
    victim.write_text("precious")
    folder.mkdir()
    (folder / f"matrix.{os.getpid()}.partial").symlink_to(victim)  # the name of earlier versions
    solved(Journal(matrix(), folder))
    assert victim.read_text() == "precious"
    assert all(f.stat().st_mode & 0o077 == 0 for f in folder.glob("*.pt"))


def test_a_journal_of_what_is_not_finite_or_no_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="a product is not finite"):
        Journal(Dense(torch.full((2, 2), torch.nan)), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="expects path to be a directory"):
        Journal(matrix(), tmp_path / "file")
