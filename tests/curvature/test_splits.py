"""However a data set is cut into batches, its Hessian is the same, or the divisor is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import Average, EmpiricalRisk, HessianOperator
from hvpop.risk import hugging_face

from .problems import classes, error, mlp, random, set_parameters, split

SIZES = (10, 10, 3)
TIGHT = 1e-12

WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


class Tokens(nn.Module):
    """Logits (b, classes, length) for inputs (b, length, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).movedim(-1, 1)


def ignoring(y: Tensor, index: int = -100) -> Tensor:
    """Return labels of which about a third is ignored, in some rows all."""
    ignored = random(*y.shape, seed=9) > 0.4
    ignored[4:7] = True
    return y.masked_fill(ignored, index)


def probabilities(y: Tensor) -> Tensor:
    return 0.7 * F.one_hot(y, 3).double() + 0.1


X, Y = random(23, 4), classes(23)
REAL = random(23, 3, seed=1)
SEQUENCES, LABELS = random(23, 6, 4), classes(23, 6)

LOSSES: dict[str, tuple[nn.Module, Any, tuple[Tensor, Tensor]]] = {
    "cross entropy": (mlp(), nn.CrossEntropyLoss(), (X, Y)),
    "ignored": (mlp(), nn.CrossEntropyLoss(), (X, ignoring(Y))),
    "ignored class": (mlp(), nn.CrossEntropyLoss(ignore_index=1), (X, Y)),
    "class weights": (mlp(), nn.CrossEntropyLoss(WEIGHTS), (X, Y)),
    "weights, ignored": (
        mlp(),
        nn.CrossEntropyLoss(WEIGHTS, ignore_index=-1),
        (X, ignoring(Y, -1)),
    ),
    "weights, ignored class": (mlp(), nn.CrossEntropyLoss(WEIGHTS, ignore_index=2), (X, Y)),
    "smoothed": (
        mlp(),
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
        (X, ignoring(Y)),
    ),
    "probabilities": (mlp(), nn.CrossEntropyLoss(WEIGHTS), (X, probabilities(Y))),
    "nll": (
        nn.Sequential(mlp(), nn.LogSoftmax(1)),
        nn.NLLLoss(WEIGHTS, ignore_index=0),
        (X, Y),
    ),
    "tokens": (Tokens(), nn.CrossEntropyLoss(WEIGHTS), (SEQUENCES, ignoring(LABELS))),
    "function": (mlp(), F.cross_entropy, (X, ignoring(Y))),
    "partial": (mlp(), partial(F.cross_entropy, weight=WEIGHTS, ignore_index=1), (X, Y)),
    "partial of partial": (
        mlp(),
        partial(partial(F.cross_entropy, weight=WEIGHTS), ignore_index=2),
        (X, Y),
    ),
    "partial of module": (mlp(), partial(nn.CrossEntropyLoss(WEIGHTS)), (X, ignoring(Y))),
    "subclass": (
        mlp(),
        type("Renamed", (nn.CrossEntropyLoss,), {})(WEIGHTS),
        (X, ignoring(Y)),
    ),
    "squares": (mlp(), nn.MSELoss(), (X, REAL)),
    "huber": (mlp(), partial(F.huber_loss, delta=0.7), (X, REAL)),
    "poisson": (mlp(), nn.PoissonNLLLoss(), (X, REAL.abs())),
    "logits": (mlp(), nn.BCEWithLogitsLoss(), (X, (REAL > 0).double())),
    "own function": (mlp(), lambda out, y: ((out - y) ** 4).mean(), (X, REAL)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_split_gives_the_same_product(name: str) -> None:
    model, loss, data = LOSSES[name]
    whole = HessianOperator(model, loss, [data])
    V = random(whole.shape[1], 2)
    expected = whole @ V
    for sizes in (SIZES, (1,) * 23, (4, 3, 16), (22, 1)):
        H = HessianOperator(model, loss, split(data, sizes))
        assert error(H @ V, expected) < TIGHT
        assert error(H.linearize() @ V, expected) < TIGHT
        full = HessianOperator(model, loss, split(data, sizes), mode="full")
        assert error(full @ V, expected) < TIGHT


def test_sequences_of_different_length_count_by_their_elements() -> None:
    """Batches of one length each; all sequences at once cannot be a batch, so a sum by hand."""
    lengths = ((5, 2), (3, 6), (4, 1))
    batches = [
        (random(b, t, 4, seed=b), random(b, t, 3, seed=10 + t)) for b, t in lengths
    ]  # of b sequences of t steps
    model = mlp()
    whole = [
        (
            torch.cat([x.reshape(-1, 4) for x, _ in batches]),
            torch.cat([y.reshape(-1, 3) for _, y in batches]),
        )
    ]
    expected = HessianOperator(model, nn.MSELoss(), whole).to_dense()
    H = HessianOperator(model, nn.MSELoss(), batches)
    assert error(H.to_dense(), expected) < TIGHT
    assert error(H.linearize().to_dense(), expected) < TIGHT


class LanguageModel(nn.Module):
    """A model that computes its own loss, as those of Hugging Face do."""

    loss_type = "ForCausalLM"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        set_parameters(self.double())

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
        return SimpleNamespace(logits=logits, loss=loss)


def test_a_language_model_counts_the_tokens_that_are_predicted() -> None:
    model = LanguageModel()
    ids = classes(23, 6, of=7)
    whole = {"input_ids": ids, "labels": ignoring(ids)}

    def hessian(batches: list[Any]) -> HessianOperator:
        return HessianOperator.from_risk(
            EmpiricalRisk.from_batch_loss(model, hugging_face(), batches)
        )

    V = random(hessian([whole]).shape[1], 2)
    expected = hessian([whole]) @ V
    for sizes in (SIZES, (4, 3, 16)):  # the second has a batch without any label
        parts = [
            dict(zip(whole, values, strict=True)) for values in split(list(whole.values()), sizes)
        ]
        assert error(hessian(parts) @ V, expected) < TIGHT
        assert error(hessian(parts).linearize() @ V, expected) < TIGHT


def test_a_batch_loss_may_say_its_own_weight() -> None:
    class Weighted:
        """Samples with weights of their own, ``sum_i w_i l_i / sum_i w_i``."""

        def __call__(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            x, y, w = batch
            return (w * (model(x) - y).square().mean(1)).sum() / w.sum()

        def weight(self, model: nn.Module, batch: tuple[Tensor, ...]) -> float:
            return float(batch[2].sum())

    model, data = mlp(), (X, REAL, random(23, seed=3).abs())
    whole = HessianOperator.from_risk(EmpiricalRisk.from_batch_loss(model, Weighted(), [data]))
    parts = EmpiricalRisk.from_batch_loss(model, Weighted(), split(data, SIZES))
    H = HessianOperator.from_risk(parts)
    assert error(H.to_dense(), whole.to_dense()) < TIGHT
    assert error(H.linearize().to_dense(), whole.to_dense()) < TIGHT


HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "class weights": lambda out, y: F.cross_entropy(out, y, weight=WEIGHTS),
    "ignored targets": lambda out, y: 1.0 * F.cross_entropy(out, y),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_divisor_that_cannot_be_known_is_asked_for(name: str) -> None:
    loss, data = HIDDEN[name], (X, ignoring(Y))
    model = mlp()
    whole = HessianOperator(model, loss, [data])  # one batch needs no weight
    H = HessianOperator(model, loss, split(data, SIZES))
    v = random(H.shape[1])
    for product in (H, H.linearize()):
        with pytest.raises(ValueError, match=r"the loss divides by .*Average\(weight=\.\.\.\)"):
            product @ v

    def divisor(batch: tuple[Tensor, Tensor]) -> float:
        counted = batch[1][batch[1] != -100]
        return float(WEIGHTS[counted].sum() if "weights" in name else counted.numel())

    told = HessianOperator(model, loss, split(data, SIZES), average=Average(weight=divisor))
    assert error(told @ v, whole @ v) < TIGHT


def test_a_divisor_that_is_another_is_found_out() -> None:
    def masked_mean(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none").sum() / (y != -100).sum()

    model, data = mlp(), (X, ignoring(Y))
    H = HessianOperator(model, masked_mean, split(data, SIZES))
    v = random(H.shape[1])
    with pytest.raises(ValueError, match=r"cannot be told from outside.*Average\(weight=\.\.\.\)"):
        H @ v

    count = Average(weight=lambda batch: float((batch[1] != -100).sum()))
    told = HessianOperator(model, masked_mean, split(data, SIZES), average=count)
    assert error(told @ v, HessianOperator(model, masked_mean, [data]) @ v) < TIGHT
