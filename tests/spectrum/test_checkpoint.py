"""Checkpoints: a resumed run gives the bits of the run that was never stopped; others are refused."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvpop import Damped, Dense, Diagonal, FromFunction, Identity, LinearOperator
from hvpop.distributed import Journal
from hvpop.operators import checkpoint as files
from hvpop.operators import records
from hvpop.solvers import matrix_function
from hvpop.spectrum import (
    diagonal,
    eigsh,
    frobenius_norm,
    logdet,
    spectral_density,
    spectral_norm,
    trace,
)

from .spectra import F64, Watched, dense, matrix

A = dense(torch.linspace(0.5, 3, 120, dtype=F64))

Run = Callable[..., Any]
RUNS: dict[str, Run] = {
    "eigsh": lambda A, **kw: eigsh(A, 4, **kw),
    "eigsh in blocks": lambda A, **kw: eigsh(A, 4, "BE", block=3, **kw),
    "hutchinson": lambda A, **kw: trace(A, method="hutchinson", rtol=None, **kw),
    "hutch++": lambda A, **kw: trace(A, method="hutch++", rtol=0.01, **kw),
    "xtrace": lambda A, **kw: trace(A, rtol=0.01, **kw),
    "diagonal": lambda A, **kw: diagonal(A, method="hutchinson", rtol=None, **kw),
    "xdiag": lambda A, **kw: diagonal(A, method="xdiag", rtol=None, **kw),
    "frobenius": lambda A, **kw: frobenius_norm(A, rtol=None, **kw),
    "spectral norm": spectral_norm,
    "logdet": lambda A, **kw: logdet(A, rtol=None, **{"max_products": 900, **kw}),
    "density": lambda A, **kw: spectral_density(A, **{"max_products": 1200, **kw}),
}


def bits(result: Any) -> list[torch.Tensor]:
    return [
        value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=F64)
        for value in vars(result).values()
        if isinstance(value, torch.Tensor | float | int)
    ]


@pytest.mark.parametrize("crash", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(
    name: str, crash: type[BaseException], tmp_path: Path
) -> None:
    run, path = RUNS[name], tmp_path / "state.pt"
    whole = run(A)
    watched = Watched(A)
    run(watched.operator)
    middle = watched.passes // 2 + 2  # one pass goes to the fingerprint
    stopped = Watched(A, fail_at=middle, error=crash)
    if crash is KeyboardInterrupt:
        assert run(stopped.operator, checkpoint=path).status == "interrupted"
    else:
        with pytest.raises(RuntimeError, match="stop"):
            run(stopped.operator, checkpoint=path)
    rest = Watched(A)
    resumed = run(rest.operator, checkpoint=path)
    assert resumed.status == whole.status
    assert rest.passes < watched.passes
    for mine, theirs in zip(bits(resumed), bits(whole), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_not_run_again(name: str, tmp_path: Path) -> None:
    first = RUNS[name](A, checkpoint=tmp_path / "state.pt")
    watched = Watched(A)
    again = RUNS[name](watched.operator, checkpoint=tmp_path / "state.pt")
    assert watched.products in (1, 2)  # the fingerprint, with A' A of A and A'
    assert again.status == first.status
    for mine, theirs in zip(bits(again), bits(first), strict=True):
        assert torch.equal(mine, theirs)


def test_the_bar_of_a_resumed_run_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state.pt"
    before = eigsh(A, 4, max_products=20, checkpoint=path)
    eigsh(A, 4, max_products=500, checkpoint=path, progress=True)
    counts = re.findall(r"(\d+)/500", capsys.readouterr().err)
    assert int(counts[0]) == before.products > 0


def test_a_spent_budget_can_be_raised(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    assert eigsh(A, 4, max_products=20, checkpoint=path).status == "max products"
    resumed, whole = eigsh(A, 4, checkpoint=path), eigsh(A, 4)
    assert torch.equal(resumed.eigenvectors, whole.eigenvectors)


@pytest.mark.parametrize("budget", [50, 330])
@pytest.mark.parametrize("name", sorted(set(RUNS) - {"logdet"}))
def test_a_budget_that_cuts_a_round_short_changes_nothing_when_raised(
    name: str, budget: int, tmp_path: Path
) -> None:
    run, path = RUNS[name], tmp_path / "state.pt"
    run(A, max_products=budget, checkpoint=path)
    resumed, whole = run(A, checkpoint=path), run(A)
    assert resumed.status == whole.status
    assert resumed.products == whole.products
    mine, theirs = (getattr(r, "eigenvalues", None) for r in (resumed, whole))
    if mine is None:
        mine, theirs = (torch.as_tensor(r.value) for r in (resumed, whole))
    assert torch.allclose(mine, theirs, rtol=1e-9)


def run_with(A: LinearOperator, path: Path) -> Any:
    return eigsh(A, 4, max_products=20, checkpoint=path)


def hidden(A: LinearOperator) -> LinearOperator:
    """The same matrix as a part that cannot be looked into."""
    return FromFunction(lambda V: A @ V, A.shape, dtype=A.torch_dtype, symmetric=True)


LARGE = Dense(1e4 * matrix(torch.linspace(0, 1, 120, dtype=F64))[0].float(), symmetric=True)
EYE = Identity.like(A)
ZEROED = torch.ones(120, dtype=F64)
ZEROED[7] = 0.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (A, A + 1e-10 * EYE),
        (A + 0.05 * EYE, A + 0.5 * EYE),
        (LARGE + 0.05 * Identity.like(LARGE), LARGE + 0.5 * Identity.like(LARGE)),
        (hidden(LARGE + 0.05 * Identity.like(LARGE)), hidden(LARGE + 0.5 * Identity.like(LARGE))),
        (hidden(A), hidden(A + 1e-10 * EYE)),
        (Damped(LARGE, 1e-3), Damped(LARGE, 2e-3)),
        (Damped(A, ZEROED), Damped(A, torch.ones(120, dtype=F64))),
        (A, 2.0 * A),
        (A, 1.0000001 * A),
        (A, -1.0 * A),
        (A + 1e-9 * Diagonal(ZEROED), A + 1e-9 * EYE),
        (A @ A, A**3),
        (hidden(1e-30 * A), hidden(2e-30 * A)),
    ],
)  # fmt: skip
def test_another_operator_is_refused(
    one: LinearOperator, other: LinearOperator, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    run_with(one, path)
    with pytest.raises(ValueError, match=r"belongs to another (operator|computation)"):
        run_with(other, path)
    run_with(one, path)  # is still there


class Shifted(LinearOperator):
    """``A + shift I``, composed as users do: a tensor of its own, and a count of its products."""

    def __init__(self, inner: LinearOperator, shift: float) -> None:
        super().__init__(inner.shape, dtype=inner.torch_dtype, device="cpu", symmetric=True)
        self.inner, self.shift, self.count = inner, torch.tensor(shift, dtype=F64), 0

    def _children(self) -> tuple[LinearOperator, ...]:
        return (self.inner,)

    def _apply(self, V: Tensor) -> Tensor:
        self.count += 1
        return self.inner @ V + self.shift * V


def test_what_a_composite_of_a_users_own_holds_beside_its_parts_counts(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run_with(Shifted(A, 1.0), path)
    with pytest.raises(ValueError, match="belongs to another operator"):
        run_with(Shifted(A, 5.0), path)  # was continued: eigenvalues 4 too small
    with pytest.raises(ValueError, match="belongs to another operator"):
        run_with(Shifted(A, 1.0 + 1e-9), path)


def test_functions_of_one_matrix_are_operators_of_their_own(tmp_path: Path) -> None:
    path, positive = tmp_path / "state.pt", A @ A + EYE
    run_with(matrix_function(positive, "sqrt"), path)
    with pytest.raises(ValueError, match="belongs to another operator"):
        run_with(matrix_function(positive, "log"), path)


def test_an_operator_that_counts_its_products_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    counting = Shifted(A, 1.0)
    found = run_with(counting, path)
    assert run_with(counting, path).products == found.products
    journal = Journal(A, tmp_path / "journal")
    found = run_with(journal, tmp_path / "journaled.pt")
    assert run_with(journal, tmp_path / "journaled.pt").products == found.products


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_rounding_does_not_make_another_operator(precision: torch.dtype, tmp_path: Path) -> None:
    M = matrix(torch.cat([torch.linspace(-1, 1, 119), torch.tensor([1e3])]))[0].to(precision)
    half = M[:, :60], M[:, 60:]
    backwards = FromFunction(  # the same sums in another order
        lambda V: half[1].flip(1) @ V[60:].flip(0) + half[0].flip(1) @ V[:60].flip(0),
        (120, 120), dtype=precision, symmetric=True,
    )  # fmt: skip
    once = hidden(Dense(M)) + Identity(120, dtype=precision)
    again = backwards + Identity(120, dtype=precision)
    found = run_with(once, tmp_path / "state.pt")
    assert run_with(again, tmp_path / "state.pt").products == found.products


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda path: eigsh(A, 5, checkpoint=path), "settings"),
        (lambda path: eigsh(A, 4, seed=1, checkpoint=path), "settings"),
        (lambda path: eigsh(A, 4, v0=torch.ones(120, dtype=F64), checkpoint=path), "settings"),
        (lambda path: trace(A, checkpoint=path), "task is 'eigsh'"),
        (lambda path: eigsh(dense(torch.ones(9)), 4, checkpoint=path), "shape"),
    ],
)
def test_another_computation_is_refused(
    other: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    eigsh(A, 4, max_products=20, checkpoint=path)
    with pytest.raises(ValueError, match=message):
        other(path)


def written(path: Path, content: object) -> bytes:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "content", [b"chapter one", b"", {"weight": torch.ones(3)}, torch.ones(3), [1, 2]]
)
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(content: object, tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    before = written(path, content)
    refusal = r"thesis\.tex is not a checkpoint of hvpop; give another path, or delete the file$"
    with pytest.raises(ValueError, match=refusal):
        eigsh(A, 4, checkpoint=path)
    assert path.read_bytes() == before


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_file_with_one_other_bit_is_no_checkpoint(share: float, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run_with(A, path)
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)
    watched = Watched(A)
    with pytest.raises(ValueError, match="is not a checkpoint of hvpop"):
        run_with(watched.operator, path)
    assert watched.products == 1  # the fingerprint


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_no_checkpoint(share: float, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    eigsh(A, 4, max_products=20, checkpoint=path)
    whole = bytearray(path.read_bytes())
    path.write_bytes(bytes(whole[: int(share * len(whole))]))
    with pytest.raises(ValueError, match="is not a checkpoint of hvpop"):
        eigsh(A, 4, checkpoint=path)


def whole(content: Any, path: Path) -> None:
    """A file with everything right but what it holds."""
    with open(path, "wb") as file:
        file.write(records.MAGIC)
        records.write(file, b"", content, {})


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"identity": h, "state": {}}])
def test_a_file_runs_no_code(wrap: Callable[[Hostile], object], tmp_path: Path) -> None:
    path, mark = tmp_path / "state.pt", tmp_path / "ran"
    for write in (torch.save, lambda content, p: p.write_bytes(pickle.dumps(content)), whole):
        write(wrap(Hostile(mark)), path)
        with pytest.raises(ValueError, match="is not a checkpoint of hvpop"):
            eigsh(A, 4, checkpoint=path)
    assert not mark.exists()


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(("loose", "share"), [(1e-1, 1.5), (1e-2, 1.5), (1e-3, 1.0), (1e-5, 0.6)])
def test_a_tightened_tolerance_goes_on_from_where_it_stands(
    loose: float, share: float, block: int, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    steep = dense(torch.linspace(0, 1, 300, dtype=F64) ** 3)
    eigsh(steep, 3, rtol=loose, block=block, checkpoint=path)
    watched = Watched(steep)
    tight = eigsh(watched.operator, 3, rtol=1e-9, block=block, checkpoint=path)
    fresh = eigsh(steep, 3, rtol=1e-9, block=block)
    assert tight.status == fresh.status == "converged"
    assert watched.products - 1 < share * fresh.products  # a rough start is worth little
    assert tight.residuals.max() <= 1e-9 * (1 + 1e-6)
    torch.testing.assert_close(tight.eigenvalues, fresh.eigenvalues, rtol=0, atol=1e-12)


def test_a_tightened_estimate_goes_on_from_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    loose = trace(A, rtol=0.1, method="hutchinson", checkpoint=path)
    watched = Watched(A)
    tight = trace(watched.operator, rtol=0.01, method="hutchinson", checkpoint=path)
    assert tight.status == "converged"
    assert watched.products - 1 == tight.products - loose.products


@pytest.mark.parametrize("name", RUNS)
def test_a_path_in_a_folder_that_is_missing_is_refused_before_any_product(
    name: str, tmp_path: Path
) -> None:
    watched = Watched(A)
    with pytest.raises(
        FileNotFoundError, match=r"expects checkpoint .* make the folder .*nowhere,"
    ):
        RUNS[name](watched.operator, checkpoint=tmp_path / "nowhere" / "state.pt")
    assert watched.products == 0


def test_a_folder_is_refused_before_any_product(tmp_path: Path) -> None:
    watched = Watched(A)
    with pytest.raises(
        IsADirectoryError, match=r"path of a file, got the folder .*such as .*\.pt$"
    ):
        eigsh(watched.operator, 4, checkpoint=tmp_path)
    assert watched.products == 0


def test_a_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    eigsh(A, 4, max_products=20, checkpoint=path)
    before = path.read_bytes()

    def full_disk(content: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.warns(RuntimeWarning, match="state.pt cannot be written .*disk full") as warned:
        assert eigsh(A, 4, checkpoint=path).status == "converged"
    assert len(warned) == 1
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("run", ["eigsh", "hutchinson"])
def test_a_folder_that_vanishes_costs_no_result(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.Checkpoint, "due", lambda self: True)
    folder = tmp_path / "gone"
    folder.mkdir()
    watched = Watched(A)

    def product(V: torch.Tensor) -> torch.Tensor:
        if watched.passes == 3:
            shutil.rmtree(folder)
        return watched.operator @ V

    vanishing = FromFunction(product, A.shape, symmetric=True)
    with pytest.warns(RuntimeWarning, match="cannot be written") as warned:
        found = RUNS[run](vanishing, checkpoint=folder / "state.pt")
    assert len(warned) == 1
    for mine, theirs in zip(bits(found), bits(RUNS[run](A)), strict=True):
        assert torch.equal(mine, theirs)


def test_two_threads_may_write_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.Checkpoint, "due", lambda self: True)
    path = tmp_path / "state.pt"
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda _: eigsh(A, 4, checkpoint=path).status, range(4)))
    assert ends == ["converged"] * 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    assert eigsh(A, 4, checkpoint=path).status == "converged"


def test_a_checkpoint_is_private_and_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "target.pt", tmp_path / "link.pt"
    link.symlink_to(target)
    eigsh(A, 4, checkpoint=link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    watched = Watched(A)
    eigsh(watched.operator, 4, checkpoint=link)
    assert watched.products == 1


def test_nothing_is_written_through_a_link_at_a_name_that_was_guessed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "state.pt"
    victim.write_text("precious")
    for name in (f"state.pt.{os.getpid()}.tmp", "state.pt.tmp", ".hvpop-.tmp"):
        (tmp_path / name).symlink_to(victim)
    eigsh(A, 4, checkpoint=path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_a_long_run_saves_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PAUSE", 0.0)
    monkeypatch.setattr(files, "_SHARE", 1e9)
    path, seen = tmp_path / "state.pt", []

    class Looking(LinearOperator):
        def _apply(self, V: torch.Tensor) -> torch.Tensor:
            seen.append(path.exists())
            return A @ V

    eigsh(Looking(A.shape, dtype=F64, device="cpu", symmetric=True), 4, checkpoint=path)
    assert seen[:2] == [False, False]  # the fingerprint and the first product
    assert all(seen[2:])


def test_steps_are_appended_until_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PAUSE", 0.0)
    monkeypatch.setattr(files, "_SHARE", 1e9)
    path, seen = tmp_path / "state.pt", []

    def product(V: torch.Tensor) -> torch.Tensor:
        seen.append((path.stat().st_ino, path.stat().st_size) if path.exists() else None)
        return D @ V

    D = Diagonal(torch.linspace(0, 1, 20_000, dtype=F64))
    watched = FromFunction(product, D.shape, symmetric=True)
    eigsh(watched, 2, basis=12, max_products=30, checkpoint=path)
    sizes = [s for s in seen if s is not None]
    vector = 8 * D.shape[0]
    steps = [(a, b) for a, b in pairwise(sizes) if a[0] == b[0]]
    assert len(steps) > 2 * len(sizes) // 3  # all but the restarts
    # a row and the vector after it, and what is small
    assert all(b[1] - a[1] < 2.2 * vector for a, b in steps)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("lost", [1, 100, 100_000])
def test_of_a_torn_write_the_last_whole_state_is_used(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    D, path = Diagonal(torch.linspace(0, 1, 20_000, dtype=F64)), tmp_path / "state.pt"
    expected = eigsh(D, 2, basis=12, max_products=40)
    monkeypatch.setattr(files, "_PAUSE", 0.0)
    monkeypatch.setattr(files, "_SHARE", 1e9)
    eigsh(D, 2, basis=12, max_products=10, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-lost])
    found = eigsh(D, 2, basis=12, max_products=9, checkpoint=path)
    assert found.products == 9  # of ten
    resumed = eigsh(D, 2, basis=12, max_products=40, checkpoint=path)
    for mine, theirs in zip(bits(resumed), bits(expected), strict=True):
        assert torch.equal(mine, theirs)


KILLED = """
import os, signal, sys, torch
from hvpop import Diagonal
from hvpop.operators import replacing
from hvpop.spectrum import eigsh
torch.set_num_threads(1)
replacing.flush = lambda file: os.kill(os.getpid(), signal.SIGKILL)
for path in sys.argv[1:]:
    if not (child := os.fork()):
        eigsh(Diagonal(torch.arange(50.0)), 2, checkpoint=path)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "state.pt", tmp_path / "other.pt"
    run = [sys.executable, "-c", KILLED, str(path), str(path), str(other)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == 3 * [str(-signal.SIGKILL)]
    assert len(list(tmp_path.glob(".hvpop-*.tmp"))) == 2  # the second has removed that of the first
    eigsh(Diagonal(torch.arange(50.0)), 2, checkpoint=path)
    left = [entry.name for entry in tmp_path.iterdir()]
    assert "state.pt" in left
    assert len(left) == 2  # one of the other path
