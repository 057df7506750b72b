"""What a linearized operator keeps is what it says, and within its budget, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvpop import GaussNewtonOperator, HessianOperator
from hvpop.curvature.memory import free_memory, of_control_groups

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="what a process keeps is read from /proc"
)

START = """
import ctypes, gc, json, resource, torch
from torch import nn
from hvpop import GaussNewtonOperator, HessianOperator
torch.set_num_threads(1)

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def resident():
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # of other systems' libraries memory goes back by itself
    return status("VmRSS:")
"""

KEPT = """
def kept(kind, model, data, budget):
    H = kind(model, nn.CrossEntropyLoss(), data)
    v = torch.ones(H.shape[1])
    H.linearize(memory=budget) @ v  # what torch and MKL load and set aside at first use
    before = resident()
    A = H.linearize(memory=budget)
    A @ v
    A @ v
    return {"process": resident() - before, "report": A.report().bytes, "kept": A.report().kept}

def batches(shape, size, count):
    return [(torch.randn(size, *shape), torch.randint(10, (size,))) for _ in range(count)]

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.lstm, self.head = nn.Embedding(99, 256), nn.LSTM(256, 256), nn.Linear(256, 10)
    def forward(self, x):
        return self.head(self.lstm(self.token(x.long().T))[0][-1])

wide = nn.Sequential(nn.Linear(1000, 2000), nn.Tanh(), nn.Linear(2000, 2000), nn.Tanh(), nn.Linear(2000, 10))
images = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
    nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
).eval()
text = Text(), [(torch.randint(99, (16, 20)), y) for _, y in batches((1,), 16, 4)]
found = {
    "6 M, 40 batches": kept(HessianOperator, wide, batches((1000,), 64, 40), "100MiB"),
    "Gauss-Newton": kept(GaussNewtonOperator, wide, batches((1000,), 16, 40), "40MiB"),
    "all of it": kept(HessianOperator, wide, batches((1000,), 128, 4), "4GiB"),
    "images": kept(HessianOperator, images, batches((3, 32, 32), 32, 4), "100MiB"),
    "recurrent": kept(HessianOperator, *text, "1GiB"),
}
print(json.dumps(found))
"""


def measured(program: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", START + program],
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return measured(KEPT)


@linux
@pytest.mark.parametrize(("case", "mebibytes"), [("6 M, 40 batches", 100), ("Gauss-Newton", 40)])
def test_a_process_keeps_no_more_than_the_budget(
    kept: dict[str, Any], case: str, mebibytes: int
) -> None:
    assert 0 < kept[case]["kept"] < 40
    assert kept[case]["process"] < 1.1 * mebibytes * 2**20


@linux
@pytest.mark.parametrize(
    "case", ["6 M, 40 batches", "Gauss-Newton", "all of it", "images", "recurrent"]
)
def test_the_report_says_what_the_process_keeps(kept: dict[str, Any], case: str) -> None:
    assert 0.9 < kept[case]["process"] / kept[case]["report"] < 1.1


# -- what is free ------------------------------------------------------------------------------------

LIMITS = ("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:"), ("RLIMIT_RSS", "VmRSS:")

LIMITED = """
import os
from hvpop.curvature.memory import free_memory
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
room = 300 * 2**20

def limited(kind, used):
    resource.setrlimit(getattr(resource, kind), (status(used) + room, resource.RLIM_INFINITY))
    free = free_memory(torch.device("cpu"))
    H = HessianOperator(nn.Linear(3, 2), nn.MSELoss(), [(torch.ones(4, 3), torch.ones(4, 2))])
    return {"free": free / room, "budget": H.linearize().report().budget / room}

def apart(kind, used):  # a limit stays
    end, start = os.pipe()
    if not os.fork():
        os.write(start, json.dumps(limited(kind, used)).encode())
        os._exit(0)
    os.close(start)
    with open(end) as found:
        return json.loads(found.read())

print(json.dumps({kind: apart(kind, used) for kind, used in LIMITS}))
"""


@linux
def test_a_limit_of_the_process_bounds_the_default_budget() -> None:
    found = measured(LIMITED.replace("LIMITS", repr(LIMITS)))
    assert len(found) == len(LIMITS)
    for kind, shares in found.items():
        assert 0.9 < shares["free"] < 1.1, kind
        assert 0 < shares["budget"] < 0.25, kind  # building the operator takes some of it


def group(folder: Path, limit: object, used: int, cached: int, version: int) -> None:
    """Files as a control group has them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes"
    )  # fmt: skip
    for name, number in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{number}\n")
    kind = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{kind} {cached}\n")


def system(folder: Path, membership: str) -> tuple[str, str]:
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(membership)
    return str(folder / "proc"), str(folder / "mounts")


def test_what_torch_has_in_reserve_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second of two linearized operators, made when the first is gone, keeps less."""
    told = {"mem_get_info": (50, 80), "memory_reserved": 30, "memory_allocated": 10}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 70


def test_a_control_group_leaves_its_limit_less_what_cannot_be_reclaimed(tmp_path: Path) -> None:
    files = system(tmp_path, "0::/jobs/one\n")
    group(tmp_path / "mounts" / "jobs" / "one", 1000, 600, 100, version=2)
    assert list(of_control_groups(*files)) == [500]


def test_the_groups_above_count_too_and_those_without_a_limit_do_not(tmp_path: Path) -> None:
    files = system(tmp_path, "0::/jobs/one\n")
    group(tmp_path / "mounts" / "jobs" / "one", "max", 10, 0, version=2)
    group(tmp_path / "mounts" / "jobs", 2000, 1500, 0, version=2)
    assert list(of_control_groups(*files)) == [500]


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    files = system(tmp_path, "0::/kubepods/pod/elsewhere\n")
    group(tmp_path / "mounts", 1000, 100, 0, version=2)
    assert list(of_control_groups(*files)) == [900]


def test_groups_of_the_first_version_are_seen(tmp_path: Path) -> None:
    files = system(tmp_path, "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    group(tmp_path / "mounts" / "memory" / "a", 1000, 300, 100, version=1)
    group(tmp_path / "mounts" / "memory", 2**63 - 4096, 300, 0, version=1)  # which means: none
    assert min(of_control_groups(*files)) == 800


def test_without_control_groups_there_is_no_such_limit(tmp_path: Path) -> None:
    assert list(of_control_groups(str(tmp_path), str(tmp_path))) == []
    assert free_memory(torch.device("cpu")) > 0


# -- gradients ---------------------------------------------------------------------------------------


def test_a_kept_map_holds_no_tensor_as_large_as_its_parameters() -> None:
    """Beyond the point: of a gradient its place in the graph is enough."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3)).double()
    data = [(torch.ones(2, 300, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))]
    size = 8 * sum(p.numel() for p in model.parameters())
    for kind in (HessianOperator, GaussNewtonOperator):
        report = kind(model, nn.MSELoss(), data).linearize(memory="1GiB").report()
        assert report.kept == 1
        assert report.bytes < 1.2 * size
