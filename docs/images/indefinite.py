"""Draws `indefinite.png`: the spectra of the Hessian and of Gauss-Newton's matrix of a small transformer.

Run it from the root of the repository: ``python docs/images/indefinite.py``. It takes a minute.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from hvpop import GaussNewtonOperator, HessianOperator

VOCABULARY, TOKENS, WIDTH = 12, 10, 10


class Decoder(nn.Module):
    """One layer of causal attention over a few tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        h = self.layer(self.token(x) + self.place, src_mask=future)
        return self.head(h).transpose(1, 2)


def main() -> None:
    """Train a little, write both matrices out, and draw their eigenvalues."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, loss = Decoder().double(), nn.CrossEntropyLoss()
    text = torch.randint(VOCABULARY, (48, TOKENS + 1)).cummax(1).values  # has something to learn
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    kinds = {
        "Hessian": (HessianOperator, "#d1632a"),
        "Gauss-Newton": (GaussNewtonOperator, "#1f5f99"),
    }
    for name, (kind, color) in kinds.items():
        A = kind(model, loss, [(x, y)]).linearize()
        values = torch.linalg.eigvalsh(A.to_dense()).flip(0)
        negative = int((values < -1e-9 * values.max()).sum())
        print(f"{name}: {values[-1]:.3g} to {values[0]:.3g}, {negative} of {len(values)} negative")
        label = f"{name}, {negative} of {len(values)} negative"
        axes.plot(values.numpy(), ".", ms=2.5, color=color, label=label)
    axes.axhline(0, color="0.7", lw=0.6)
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_yticks([-1, -1e-2, -1e-4, 0, 1e-4, 1e-2, 1])
    axes.set(xlabel="number", ylabel="eigenvalue")
    axes.set_title("A transformer after 60 steps of Adam", fontsize=10)
    axes.legend(frameon=False, fontsize=9, markerscale=4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
