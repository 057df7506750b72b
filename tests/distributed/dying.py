"""Eigenvalues found by processes that are killed at given products; a program for torchrun, too.

torchrun --nproc-per-node 2 --max-restarts 2 -m tests.distributed.dying FOLDER '[["driven", 0, 30]]'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvpop import HessianOperator
from hvpop.distributed import DataParallel, Sharded, Team, init
from hvpop.operators import checkpoint
from hvpop.spectrum import eigsh

from . import problems

WAYS = ("driven", "sharded")

WARM = 2024
"""Products made before, so that maps are traced (after 2,048) while eigenvalues are sought."""


class Dying(DataParallel):
    """Kills its process in place of a product."""

    left = -1  # products until then, where not negative

    def _product(self, V: Tensor, at: int | None = None) -> Tensor:
        if Dying.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        Dying.left -= 1
        return super()._product(V, at)


def eigenvalues(
    team: Team, folder: str, how: str, kill: tuple[int, int] | None, warm: int = 0
) -> np.ndarray:
    """Four, by a leader or by all with vectors in parts; rank ``kill[0]`` dies after ``kill[1]`` products."""
    checkpoint._PAUSE, checkpoint._SHARE = 0.0, 1e9  # a save after every step
    Dying.left = -1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    data = problems.held("ragged", team.rank, team.size)
    H: Any = Dying(HessianOperator(model, nn.CrossEntropyLoss(), data)).linearize(memory="64MiB")
    if warm and not list(Path(folder).iterdir()):
        V = problems.columns(H.shape[0], warm // 8)
        for _ in range(8):
            H @ V
    if kill is not None and kill[0] == team.rank:
        Dying.left = kill[1]
    saved: dict[str, Any] = {"basis": 14, "rtol": 1e-10, "checkpoint": f"{folder}/{how}.pt"}
    if how == "driven":
        found = H.drive(lambda A: eigsh(A, 4, **saved))
    else:
        found = eigsh(Sharded(H), 4, **saved)
    assert found.status == "converged"
    assert (", traced" in H.report()) == bool(warm)
    values: np.ndarray = found.eigenvalues.numpy()
    return values


def main(folder: str, plan: str) -> None:
    torch.set_num_threads(1)
    attempt, kills = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), json.loads(plan)
    team = init()
    for how in WAYS:
        kill = kills[attempt][1:] if attempt < len(kills) and kills[attempt][0] == how else None
        os.makedirs(saved := f"{folder}/{how}", exist_ok=True)
        np.save(f"{folder}/{how}_{team.rank}.npy", eigenvalues(team, saved, how, kill))


if __name__ == "__main__":
    main(*sys.argv[1:])
