"""What long computations keep: real peaks of fresh processes, in vectors of n numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

N = 3_000_000
SCRIPT = """
import re, sys, torch
from hvpop import Damped, Diagonal
from hvpop.solvers import cg, minres
from hvpop.operators import checkpoint
from hvpop.spectrum import eigsh, spectral_density, trace

torch.set_num_threads(1)
checkpoint._PAUSE, checkpoint._SHARE = 0.0, 1e9  # after every step

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def run(n):
    d = torch.linspace(0.0, 1.0, n)
    d[n // 2], d[n // 3] = 10.0, 8.0
    A, b = Damped(Diagonal(d), 1e-3), torch.linspace(-1.0, 3.0, n)
    path = sys.argv[1] + "/" + str(n)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    {call}
    return (status("VmHWM") - before) / (4 * n)

run(100_000)  # what is loaded once
print(run({n}))
"""

CALLS = {
    "eigsh": ("eigsh(A, k=2)", 20 + 8),
    "eigsh restarted": ("eigsh(A, k=2, basis=14, which='SA', max_products=60)", 14 + 8),
    "eigsh with a checkpoint": ("eigsh(A, k=2, checkpoint=path)", 20 + 8),
    "eigsh continued": (
        "for m in (8, 30): eigsh(A, k=2, checkpoint=path, max_products=m)",
        20 + 8,
    ),
    "trace": ("trace(A, max_products=40)", 1 + 6),
    "spectral_density": ("spectral_density(A, steps=8, max_products=8)", 4),
    "cg": ("cg(A, b, rtol=1e-4, max_steps=30)", 6),
    "a damped block": ("A @ A.space.random(lambda v: v.fill_(1.0), 8)", 8 + 8),
    "a block of a sum": ("(A + A) @ A.space.random(lambda v: v.fill_(1.0), 8)", 8 + 2 * 8),
    "minres": ("minres(A, b, rtol=1e-4, max_steps=30)", 11),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")
@pytest.mark.parametrize("name", CALLS)
def test_the_peak_is_what_the_docstring_says(name: str, tmp_path: Path) -> None:
    call, vectors = CALLS[name]
    script = SCRIPT.replace("{call}", call).replace("{n}", str(N))
    # what is freed goes back at once, and is not counted
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= vectors + 0.5  # chunks
