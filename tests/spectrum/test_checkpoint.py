"""Checkpoints: a resumed run gives the bits of the run that was never stopped; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvpop import Diagonal, LinearOperator
from hvpop.spectrum import checkpoint as files
from hvpop.spectrum import (
    diagonal,
    eigsh,
    frobenius_norm,
    logdet,
    spectral_density,
    spectral_norm,
    trace,
)

from .spectra import F64, Watched, dense

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


def test_another_operator_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    eigsh(A, 4, max_products=20, checkpoint=path)
    nearby = A + 1e-10 * Diagonal(torch.ones(120, dtype=F64))
    with pytest.raises(ValueError, match=r"belongs to another operator .* differ by"):
        eigsh(nearby, 4, checkpoint=path)


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
    refusal = r"thesis\.tex is not a checkpoint of hvpop\.spectrum; give another path, or delete the file$"
    with pytest.raises(ValueError, match=refusal):
        eigsh(A, 4, checkpoint=path)
    assert path.read_bytes() == before


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

    monkeypatch.setattr(files.torch, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        eigsh(A, 4, checkpoint=path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


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
