"""Programs of many processes: one that is killed costs no digit, one that ends does so in peace."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import dying, worlds

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distributed_spectrum.py"


def started(restarts: int, *program: str) -> subprocess.Popen[Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", str(restarts), *program),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[Any], seconds: float = 240.0) -> str:
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return str(said)


def test_the_example_gives_the_eigenvalues_of_one_process_on_two_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("example_distributed_spectrum", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    alone = example.main(str(tmp_path / "alone"))

    process = started(1, str(EXAMPLE), str(tmp_path / "killed"))
    pid = tmp_path / "killed" / "rank_1.pid"
    checkpoint = tmp_path / "killed" / "eigsh.pt"
    until = time.monotonic() + 120
    while not (pid.exists() and pid.read_text() and checkpoint.exists()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert "5 largest eigenvalues, converged" in ended(process)
    np.testing.assert_allclose(np.load(tmp_path / "killed" / "eigenvalues.npy"), alone, rtol=1e-9)


def undisturbed(folder: Path, how: str, warm: int = 0) -> np.ndarray:
    folder.mkdir()
    first, other = worlds.all_of(dying.eigenvalues, 2, str(folder), how, None, warm)
    np.testing.assert_array_equal(first, other)
    return np.asarray(first)


def test_processes_killed_at_random_products_find_the_bits_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    plan = [(how, rank, int(random.integers(1, 24))) for rank, how in enumerate(dying.WAYS)]
    program = ("-m", "tests.distributed.dying", str(tmp_path), json.dumps(plan))
    ended(started(len(plan), *program))
    for how in dying.WAYS:
        expected = undisturbed(tmp_path / f"{how} alone", how)
        for rank in (0, 1):
            np.testing.assert_array_equal(np.load(tmp_path / f"{how}_{rank}.npy"), expected)


@pytest.mark.parametrize("how", dying.WAYS)
def test_a_run_that_is_killed_again_and_again_goes_on_past_the_product_where_maps_are_traced(
    how: str, tmp_path: Path
) -> None:
    expected = undisturbed(tmp_path / "alone", how, dying.WARM)
    (folder := tmp_path / "killed").mkdir()
    for kill in ((0, 5), (1, 17), (1, 3)):  # the second just before, the third after it
        outcomes = worlds.run(dying.eigenvalues, 2, str(folder), how, kill, dying.WARM)
        assert [o.killed for o in outcomes] == [kill[0] == 0, kill[0] == 1]
    for found in worlds.all_of(dying.eigenvalues, 2, str(folder), how, None, dying.WARM):
        np.testing.assert_array_equal(found, expected)


def test_a_program_may_end_without_destroying_groups() -> None:
    pairs = 8  # of which each second has groups of its own
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "tests.distributed.ending", str(pairs)]
    program = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert program.stdout.replace("left", "").split() == 2 * pairs * ["0"], program
    assert program.stdout.count("left") == 2 * pairs
