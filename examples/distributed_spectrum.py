"""The top of a Hessian's spectrum and its density over several processes, through kills.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed_spectrum.py

Each process reads its own share of the data. Rank 0 runs `eigsh`, the others serve products; after a
kill (try ``kill -9`` with a number from output/rank_*.pid) torchrun starts all anew, and the checkpoint
goes on to the very bits of an undisturbed run. Without torchrun it is a program of one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hvpop import HessianOperator
from hvpop.distributed import DataParallel, init
from hvpop.spectrum import eigsh, spectral_density


def main(output: str = "output", k: int = 5) -> np.ndarray:
    """The ``k`` largest eigenvalues, ascending; on every process."""
    team = init()
    folder = Path(output)
    folder.mkdir(exist_ok=True)
    (folder / f"rank_{team.rank}.pid").write_text(str(os.getpid()))

    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images / 16), torch.from_numpy(classes))
    sampler = DistributedSampler(data, team.size, team.rank, shuffle=False)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    H = DataParallel(
        HessianOperator(model, nn.CrossEntropyLoss(), DataLoader(data, 128, sampler=sampler))
    ).linearize()

    checkpoint = folder / "eigsh.pt"
    pairs = H.drive(lambda A: eigsh(A, k, rtol=1e-10, checkpoint=checkpoint))
    density = H.drive(lambda A: spectral_density(A, max_products=60))
    eigenvalues: np.ndarray = pairs.eigenvalues.numpy()
    if team.rank == 0:
        np.save(folder / "eigenvalues.npy", eigenvalues)
        print(H.report())
        print(f"{k} largest eigenvalues, {pairs.status}:", *(f"{x:.10f}" for x in eigenvalues))
        print(density)
    return eigenvalues


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:2])
