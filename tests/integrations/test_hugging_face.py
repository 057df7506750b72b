"""The callback in a real Trainer, with a small model of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvpop import HessianOperator
from hvpop.risk import EmpiricalRisk, hugging_face
from hvpop.spectrum import eigsh

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hvpop.integrations.hugging_face import CurvatureCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainer's own: pinned memory, old names


def samples(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 40, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row % 2, "attention_mask": row * 0 + 1} for row in tokens]


def batches(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return [{key: t[i : i + 8] for key, t in stacked.items()} for i in range(0, len(rows), 8)]


def trainer(folder: Path, **options: Any) -> Any:
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForTokenClassification(config)
    settings = transformers.TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        gradient_accumulation_steps=2, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=settings, train_dataset=samples(24))


def losses(of: Any) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "autocast to bfloat16"])
def test_training_is_the_same_to_the_last_bit_and_the_numbers_are_logged(
    tmp_path: Path, precision: dict[str, bool]
) -> None:
    plain = trainer(tmp_path / "a", **precision)
    plain.train()
    watched = trainer(tmp_path / "b", **precision)
    callback = CurvatureCallback(every=2, data=batches(samples(16)), k=2).attach(watched)
    watched.train()
    for name, p in plain.model.state_dict().items():
        assert torch.equal(p, watched.model.state_dict()[name]), name
    assert losses(plain) == losses(watched)
    found = [e for e in watched.state.log_history if "curvature/eigenvalue_1" in e]
    assert [entry["step"] for entry in found] == [2, 4, 6]
    assert all(e["curvature/eigenvalue_1"] >= e["curvature/eigenvalue_2"] for e in found)
    assert callback.tracker is not None
    assert len(callback.tracker.history) == 3


def test_the_numbers_are_those_of_the_operator(tmp_path: Path) -> None:
    data = batches(samples(16))
    callback = CurvatureCallback(every=6, data=data, trace=False, rtol=1e-4)
    watched = trainer(tmp_path)
    watched.add_callback(callback)  # without attach: into the history alone
    watched.train()
    (entry,) = [e for e in watched.state.log_history if "curvature/eigenvalue_1" in e]
    watched.model.train()
    risk = EmpiricalRisk.from_batch_loss(watched.model, hugging_face(), data)
    expected = eigsh(HessianOperator.from_risk(risk), 1, rtol=1e-4, max_products=200)
    value = expected.eigenvalues[-1].item()
    assert entry["curvature/eigenvalue_1"] == pytest.approx(value, rel=1e-6)


def test_gauss_newton_and_fisher_are_tracked_by_name(tmp_path: Path) -> None:
    watched = trainer(tmp_path)
    for matrix in ("gauss-newton", "fisher"):
        options: Any = {"trace": False, "params": "classifier.*"}
        CurvatureCallback(every=3, data=batches(samples(8)), matrix=matrix, **options).attach(
            watched
        )
    watched.train()
    values = [
        e["curvature/eigenvalue_1"] for e in watched.state.log_history if "curvature/products" in e
    ]
    assert len(values) == 4
    # of cross entropy they are one matrix
    assert values[0::2] == pytest.approx(values[1::2], rel=1e-3)


def test_a_matrix_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a matrix in hessian, gauss-newton, fisher"):
        CurvatureCallback(every=1, data=[], matrix="inverse")
