"""What long computations keep: real peaks, in a process of their own, in vectors of n numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

N = 3_000_000
SCRIPT = """
import ctypes, json, re, sys, torch
from hvpop import Damped, Diagonal
from hvpop.solvers import cg, minres
from hvpop.operators import checkpoint
from hvpop.spectrum import eigsh, spectral_density, trace

torch.set_num_threads(1)
checkpoint._PAUSE, checkpoint._SHARE = 0.0, 1e9  # after every step
trim = getattr(ctypes.CDLL(None), "malloc_trim", int)

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def run(call, n, path):
    d = torch.linspace(0.0, 1.0, n)
    d[n // 2], d[n // 3] = 10.0, 8.0
    A, b = Damped(Diagonal(d), 1e-3), torch.linspace(-1.0, 3.0, n)
    trim(0)  # what the call before has left free would hide what this one takes
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    exec(call)
    return (status("VmHWM") - before) / (4 * n)

peaks = {}
for name, call in json.loads(sys.argv[2]).items():
    path = sys.argv[1] + "/" + name
    run(call, 100_000, path + " small")  # what is loaded once
    peaks[name] = run(call, int(sys.argv[3]), path)
print(json.dumps(peaks))
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
def test_the_peaks_are_what_the_docstrings_say(tmp_path: Path) -> None:
    calls = json.dumps({name: call for name, (call, _) in CALLS.items()})
    # what is freed goes back at once, and is not counted
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), calls, str(N)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert set(peaks) == set(CALLS)
    chunks = 0.5
    over = {name: peak for name, peak in peaks.items() if peak > CALLS[name][1] + chunks}
    assert not over
