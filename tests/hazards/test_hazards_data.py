"""Batches as loaders make them: uneven, summed, ignored, shuffled, dropped, augmented, read once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hvpop import BATCHES, TOTAL, Average, EmpiricalRisk, HessianOperator
from hvpop.risk import hugging_face

from .problems import EXACT, Apply, classes, error, labelled, mlp, random, split, truth, vector

SIZES = (10, 10, 3)
LOSS = nn.CrossEntropyLoss()


ONE_BY_ONE = nn.Sequential(mlp(), Apply(torch.clone))
"""A network of which no batches are run together, as they are of ordinary layers."""


@pytest.mark.parametrize("model", [mlp(), ONE_BY_ONE], ids=["joined", "one_by_one"])
def test_an_uneven_last_batch_counts_by_its_samples(model: nn.Module) -> None:
    x, y = labelled()
    v, batches = vector(model), split((x, y), SIZES)
    expected = truth(model, x, y) @ v
    assert error(HessianOperator(model, LOSS, batches) @ v, expected) < EXACT
    batches_alike = HessianOperator(model, LOSS, batches, average=BATCHES) @ v
    assert error(batches_alike, expected) > 0.01


def test_a_loss_that_sums_is_summed_over_the_batches() -> None:
    model, (x, y) = ONE_BY_ONE, labelled()
    v, batches = vector(model), split((x, y), SIZES)
    summed = nn.CrossEntropyLoss(reduction="sum")
    Hv = HessianOperator(model, summed, batches, average=TOTAL) @ v
    assert error(Hv, truth(model, x, y, summed) @ v) < EXACT  # and not a third of it
    with pytest.raises(ValueError, match="reduction='sum'"):
        HessianOperator(model, summed, batches) @ v


def test_ignored_targets_do_not_count() -> None:
    model, (x, y) = mlp(), labelled()
    y[torch.tensor([0, 1, 2, 3, 4, 5, 6, 21])] = -100  # 7, 0 and 1 of the batches
    v = vector(model)
    expected = truth(model, x, y) @ v
    batches = split((x, y), SIZES)
    assert error(HessianOperator(model, LOSS, batches) @ v, expected) < EXACT
    by_samples = Average(weight=lambda batch: len(batch[1]))
    wrong = HessianOperator(model, LOSS, batches, average=by_samples) @ v
    assert error(wrong, expected) > 0.05


def test_a_batch_counts_by_its_class_weights() -> None:
    model, (x, y) = mlp(), labelled()
    v, order = vector(model), y.argsort()  # so that the batches differ in their classes
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
    batches = split((x[order], y[order]), SIZES)
    expected = truth(model, x, y, weighted) @ v
    assert error(HessianOperator(model, weighted, batches) @ v, expected) < EXACT
    by_samples = Average(weight=lambda batch: len(batch[1]))
    wrong = HessianOperator(model, weighted, batches, average=by_samples) @ v
    assert error(wrong, expected) > 0.05


def test_a_function_that_hides_its_divisor_is_refused() -> None:
    model, (x, y) = mlp(), labelled()
    y[:7] = -100
    H = HessianOperator(model, lambda z, t: F.cross_entropy(z, t), split((x, y), SIZES))
    with pytest.raises(ValueError, match="the number of targets not ignored"):
        H @ vector(model)


class LanguageModel(nn.Module):
    """Returns its own loss, a mean over the labels that are not -100."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.net(inputs).transpose(1, 2)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels))


def test_a_language_model_counts_by_its_label_tokens() -> None:
    model, x, y = LanguageModel(), random(5, 6, 4), classes(5, 6)
    y[0, 1:], y[1, 2:] = -100, -100
    v, at_once = vector(model), {"inputs": x, "labels": y}
    batches = [{"inputs": x[i], "labels": y[i]} for i in (slice(0, 2), slice(2, 5))]

    def product(data: list[dict[str, Tensor]], average: Average | None = None) -> Tensor:
        settings = {} if average is None else {"average": average}
        risk = EmpiricalRisk.from_batch_loss(model, hugging_face(), data, **settings)
        return HessianOperator.from_risk(risk) @ v

    assert error(product(batches), product([at_once])) < EXACT
    by_samples = Average(weight=lambda batch: len(batch["labels"]))
    assert error(product(batches, by_samples), product([at_once])) > 0.05


def test_shuffling_changes_nothing() -> None:
    model, (x, y) = ONE_BY_ONE, labelled()
    v = vector(model)
    H = HessianOperator(model, LOSS, DataLoader(TensorDataset(x, y), 10, shuffle=True))
    expected = truth(model, x, y) @ v
    assert error(H @ v, expected) < EXACT
    torch.rand(3)  # the user's own random numbers do not matter either
    assert error(H @ v, expected) < EXACT


def test_shuffling_with_dropped_samples_is_still_one_matrix() -> None:
    model, (x, y) = mlp(), labelled()
    u, v = random(2, len(vector(model)))
    loader = DataLoader(TensorDataset(x, y), 10, shuffle=True, drop_last=True)
    H = HessianOperator(model, LOSS, loader)
    with pytest.warns(UserWarning, match="3 of 23 samples will be missing"):
        first = H @ v
    assert torch.equal(H @ v, first)
    assert abs(v @ (H @ u) - u @ first) < EXACT * v.norm() * u.norm()
    other_draws = [next(iter(loader)) for _ in range(2)]
    products = [HessianOperator(model, LOSS, [batch]) @ v for batch in other_draws]
    assert error(products[0], products[1]) > 0.05  # what a product would vary by


def test_dropped_samples_are_warned_about() -> None:
    model, (x, y) = mlp(), labelled()
    v = vector(model)
    H = HessianOperator(model, LOSS, DataLoader(TensorDataset(x, y), 10, drop_last=True))
    with pytest.warns(UserWarning, match="drop_last=True: 3 of 23 samples will be missing"):
        wrong = H @ v
    assert error(wrong, truth(model, x, y) @ v) > 0.01  # reason enough
    even = DataLoader(TensorDataset(x[:20], y[:20]), 10, drop_last=True)
    HessianOperator(model, LOSS, even) @ v  # nothing dropped: a warning would be an error here


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise to each sample as it is drawn."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.pairs = list(zip(*labelled(), strict=True))
        self.generator = generator

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.pairs[i]
        return x + torch.randn(4, dtype=torch.float64, generator=self.generator), y


def test_augmentation_is_drawn_alike_at_every_product() -> None:
    model, loader = mlp(), DataLoader(Augmented(), 10)
    v, H = vector(model), HessianOperator(model, LOSS, loader)
    assert torch.equal(H @ v, H @ v)
    first, second = (HessianOperator(model, LOSS, list(loader)) @ v for _ in range(2))
    assert error(first, second) > 0.05  # what two epochs differ by


def test_augmentation_that_no_seed_reaches_is_refused() -> None:
    model, loader = mlp(), DataLoader(Augmented(torch.Generator()), 10)
    H = HessianOperator(model, LOSS, loader)
    H @ vector(model)
    with pytest.raises(
        RuntimeError, match=r"gave other batches than at the first pass.*list\(data"
    ):
        H @ vector(model)


def test_a_generator_is_read_once_and_kept() -> None:
    model, (x, y) = mlp(), labelled()
    v, once = vector(model), (batch for batch in split((x, y), SIZES))
    H = HessianOperator(model, LOSS, once)
    expected = truth(model, x, y) @ v
    assert error(H @ v, expected) < EXACT  # no batch was eaten by a look ahead
    assert error(H @ v, expected) < EXACT
    with pytest.raises(ValueError, match="an iterator that was used before is empty"):
        HessianOperator(model, LOSS, once) @ v
