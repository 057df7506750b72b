"""Under torchrun: a process that is killed costs no digit."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distributed_spectrum.py"


def started(output: Path) -> subprocess.Popen[Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", "2", str(EXAMPLE), str(output)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
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


def test_the_example_gives_the_eigenvalues_of_one_process_on_two_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("example_distributed_spectrum", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    alone = example.main(str(tmp_path / "alone"))

    assert "5 largest eigenvalues, converged" in ended(started(tmp_path / "whole"))
    whole = np.load(tmp_path / "whole" / "eigenvalues.npy")
    np.testing.assert_allclose(whole, alone, rtol=1e-9)

    process = started(tmp_path / "killed")
    pid = tmp_path / "killed" / "rank_1.pid"
    checkpoint = tmp_path / "killed" / "eigsh.pt"
    until = time.monotonic() + 120
    while not (pid.exists() and pid.read_text() and checkpoint.exists()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    ended(process)
    np.testing.assert_array_equal(np.load(tmp_path / "killed" / "eigenvalues.npy"), whole)
