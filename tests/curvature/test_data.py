"""The average that an operator is, and that one product reads the data once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, nn

from hvpop import (
    BATCHES,
    SAMPLES,
    TOTAL,
    Average,
    FiniteDifference,
    ForwardOverReverse,
    HessianOperator,
    ReverseOverReverse,
)

from .problems import Pair, error, mlp, random, regression, split

SIZES = (10, 10, 3)
TIGHT = 1e-12


class Counting:
    """Batches that are counted as they are read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.passes = self.read = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for batch in self.batches:
            self.read += 1
            yield batch


# -- averages ------------------------------------------------------------------------------------


def batch_hessians() -> tuple[nn.Module, list[Pair], list[Tensor]]:
    model, batches = mlp(), split(regression(), SIZES)
    each = [HessianOperator(model, nn.MSELoss(), [b]).to_dense() for b in batches]
    return model, batches, each


@pytest.mark.parametrize("mode", ["batch", "full"])
@pytest.mark.parametrize(
    ("average", "weights", "divisor"),
    [
        (SAMPLES, SIZES, 23),
        (BATCHES, (1, 1, 1), 3),
        (TOTAL, (1, 1, 1), 1),
        (Average(weight=lambda batch: len(batch[0]) ** 2), (100, 100, 9), 209),
        (Average(weight=lambda batch: len(batch[0]), normalized=False), SIZES, 1),
    ],
    ids=["SAMPLES", "BATCHES", "TOTAL", "own weights", "own weights, not divided"],
)
def test_an_operator_is_the_weighted_average_of_its_batches(
    average: Average, weights: tuple[int, ...], divisor: int, mode: Any
) -> None:
    model, batches, each = batch_hessians()
    H = HessianOperator(model, nn.MSELoss(), batches, average=average, mode=mode)
    expected = sum(w * h for w, h in zip(weights, each, strict=True)) / divisor
    assert error(H.to_dense(), expected) < TIGHT
    assert error(H.linearize().to_dense(), expected) < TIGHT


@pytest.mark.parametrize("mode", ["batch", "full"])
@pytest.mark.parametrize("memory", [0, "1GiB"])
def test_ragged_batches_give_the_hessian_of_all_samples(mode: Any, memory: Any) -> None:
    model, (X, y) = mlp(), regression()
    whole = HessianOperator(model, nn.MSELoss(), [(X, y)])
    parts = HessianOperator(model, nn.MSELoss(), split((X, y), SIZES), mode=mode)
    V = random(whole.shape[1], 4)
    assert error(parts @ V, whole @ V) < TIGHT
    assert error(parts.linearize(memory=memory) @ V, whole @ V) < TIGHT


@pytest.mark.parametrize("mode", ["batch", "full"])
@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize(
    "strategy", [None, ReverseOverReverse(), ForwardOverReverse(), FiniteDifference()], ids=repr
)
def test_a_product_reads_the_data_once(mode: Any, columns: int, strategy: Any) -> None:
    data = Counting(split(regression(), SIZES))
    H = HessianOperator(mlp(), nn.MSELoss(), data, mode=mode, strategy=strategy)
    assert data.passes == 0
    for product in (1, 2):
        H @ random(H.shape[1], columns)
        assert (data.passes, data.read) == (product, 3 * product)


def test_a_linearized_operator_reads_the_data_once_for_all_products() -> None:
    data = Counting(split(regression(), SIZES))
    A = HessianOperator(mlp(), nn.MSELoss(), data).linearize()
    assert data.passes == 0
    for _ in range(3):
        A @ random(A.shape[1], 2)
    assert (data.passes, data.read) == (1, 3)


def test_without_memory_each_product_of_a_linearized_operator_reads_the_data_once() -> None:
    data = Counting(split(regression(), SIZES))
    A = HessianOperator(mlp(), nn.MSELoss(), data).linearize(memory=0)
    A @ random(A.shape[1], 2)
    first = data.passes
    A @ random(A.shape[1], 2)
    assert data.passes == first + 1
