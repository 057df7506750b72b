"""What counts as rounding: by dtype, and by what torch does with float32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvpop.strategies.rounding import TF32_EPS, agree, reordered, rounding


def numbers(dtype: torch.dtype, device: str = "cpu") -> Any:
    """What `rounding` looks at of a tensor, on a device that need not be there."""
    return SimpleNamespace(
        dtype=dtype,
        device=torch.device(device),
        is_floating_point=lambda: dtype.is_floating_point,
        is_complex=lambda: dtype.is_complex,
    )


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def test_the_least_precise_numbers_decide() -> None:
    kinds = [numbers(torch.float64), numbers(torch.float32), numbers(torch.int64)]
    assert rounding(kinds) == eps(torch.float32)
    assert rounding(kinds[:1]) == eps(torch.float64)
    assert rounding([*kinds, numbers(torch.bfloat16)]) == eps(torch.bfloat16)


@pytest.fixture
def precision() -> Iterator[Any]:
    """Sets what convolutions or matrix products use tensor cores for; put back afterwards."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        users = {"conv": backends.cudnn.conv, "matmul": backends.cuda.matmul}
        name, values = "fp32_precision", ("ieee", "tf32")
    else:  # before torch 2.9
        users = {"conv": backends.cudnn, "matmul": backends.cuda.matmul}
        name, values = "allow_tf32", (False, True)
    before = {key: getattr(user, name) for key, user in users.items()}
    yield lambda key, on: setattr(users[key], name, values[on])
    for key, was in before.items():
        setattr(users[key], name, was)


def test_float32_on_a_gpu_is_as_precise_as_the_user_lets_it_be(precision: Any) -> None:
    on_gpu = [numbers(torch.float32, "cuda")]
    precision("matmul", False)
    precision("conv", True)
    assert rounding(on_gpu) == TF32_EPS
    precision("conv", False)
    assert rounding(on_gpu) == eps(torch.float32)
    precision("matmul", True)
    assert rounding(on_gpu) == TF32_EPS
    assert rounding([numbers(torch.float64, "cuda")]) == eps(torch.float64)


def test_each_tensor_agrees_on_its_own_scale() -> None:
    expected = [torch.tensor([3.0, 4.0]), torch.tensor([[4e-9]])]  # of norm 5, and small
    found = [t.clone() for t in expected]
    found[0][1] += 5e-3
    assert agree(found, expected, 1.001e-3)
    assert not agree(found, expected, 0.999e-3)
    found[1] *= 1.002
    assert not agree(found, expected, 1.001e-3)


def test_what_is_nothing_but_rounding_agrees_as_far_as_rounding_repeats() -> None:
    expected, found = [torch.tensor([2e-17])], [torch.tensor([-3e-17])]
    assert agree(found, expected, 1e-3, lambda: [torch.tensor([1e-17])])
    assert not agree(found, expected, 1e-3, lambda: [torch.tensor([2.0001e-17])])
    nan = torch.tensor([torch.nan])
    assert not agree([nan], expected, 1e-3, lambda: [torch.tensor([1e-17])])


def test_half_precision_does_not_overflow() -> None:
    large = [torch.full((4,), 3e4, dtype=torch.float16)]
    assert agree(large, large, 0.0)
    assert not agree([-large[0]], large, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_in_another_order_are_within_what_reordering_may_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator, dtype=dtype)
    assert agree([x.sort().values.sum()], [x.sum()], reordered(eps(dtype)))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_numbers_whose_squares_float32_does_not_hold_are_told_apart(size: float) -> None:
    one = torch.tensor([size, size])
    assert agree([one], [one], 1e-6)
    assert not agree([2 * one], [one], 1e-6)
