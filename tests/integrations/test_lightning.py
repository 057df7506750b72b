"""The callback in a real Trainer of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

lightning: Any = pytest.importorskip("lightning.pytorch")

from hvpop.integrations.lightning import CurvatureCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainer's own: workers, cores


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=generator)
    return TensorDataset(x, torch.randint(3, (48,), generator=generator))


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fitted(folder: Path, callbacks: list[Any]) -> tuple[Any, Any]:
    lightning.seed_everything(0, verbose=False)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=callbacks, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=8, shuffle=True))
    return module, trainer


def test_training_is_the_same_to_the_last_bit_and_the_numbers_are_logged(tmp_path: Path) -> None:
    plain, _ = fitted(tmp_path, [])
    batches = [tuple(data()[:24]), tuple(data()[24:])]
    callback = CurvatureCallback(every=2, data=batches, loss=nn.CrossEntropyLoss(), k=2)
    watched, trainer = fitted(tmp_path, [callback])
    for name, p in plain.state_dict().items():
        assert torch.equal(p, watched.state_dict()[name]), name
    assert callback.tracker is not None
    assert [step for step, _ in callback.tracker.history] == [2, 4, 6]
    last = callback.tracker.history[-1][1]
    logged = trainer.callback_metrics["curvature/eigenvalue_1"].item()
    assert logged == pytest.approx(last["curvature/eigenvalue_1"], rel=1e-6)
