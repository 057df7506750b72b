"""Named tensors, such as gradients, and the flat vector they are: there and back, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hvpop import HessianOperator, Layout

from .registry import F64, entries

NET = Layout(
    ("weight", "bias", "scale"), (torch.Size([3, 2]), torch.Size([3]), torch.Size([]))
)  # 10 entries
W, b, s = entries(3, 2), entries(3, seed=1), entries(1, seed=2)[0]
FLAT = torch.cat([W.reshape(-1), b, s.reshape(1)])


@pytest.mark.parametrize(
    "tensors",
    [
        [W, b, s],
        (W, b, s),
        {"scale": s, "weight": W, "bias": b},
        {"weight": W, "bias": b, "scale": s}.values(),
    ],
    ids=["list", "tuple", "mapping in another order", "values"],
)
def test_tensors_by_order_or_by_name_become_one_vector(tensors: Any) -> None:
    assert torch.equal(NET.flatten(tensors), FLAT)


@pytest.mark.parametrize("shape", [(10,), (4, 10), (2, 4, 10), (0, 10)])
def test_flatten_is_the_inverse_of_unflatten(shape: tuple[int, ...]) -> None:
    v = entries(*shape)
    assert torch.equal(NET.flatten(NET.unflatten(v)), v)
    assert torch.equal(NET.flatten(NET.unflatten(v).values(), lead=len(shape) - 1), v)


def test_columns_go_there_and_back_by_their_transpose() -> None:
    V = entries(10, 4)
    assert torch.equal(NET.flatten(NET.unflatten(V.T)).T, V)


def test_the_gradients_of_a_model_are_a_vector_for_its_hessian() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1)).double()
    data = [(torch.tensor([0, 3]), torch.ones(2, 1, dtype=F64))]
    H = HessianOperator(model, nn.MSELoss(), data)
    model(data[0][0]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients["0.weight"].is_sparse
    g = H.layout.flatten(gradients)
    assert torch.equal(g[:10].reshape(5, 2), gradients["0.weight"].to_dense())
    assert torch.equal(H @ g, H @ H.layout.flatten(p.grad for p in model.parameters()))


def test_autograd_goes_through_flatten() -> None:
    leaf = b.clone().requires_grad_()
    NET.flatten([W, leaf, s]).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(3, dtype=F64))


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no gradient": (
        ValueError,
        r"a tensor for 'bias', got None, .*: the loss does not reach .* or backward\(\) has not run; "
        r"give zeros of shape \(3,\)",
        lambda: NET.flatten([W, None, s]),  # type: ignore[list-item]
    ),
    "the wrong order": (
        ValueError,
        r"shape \(3, 2\) for 'weight', got \(3,\); the order is weight, bias, scale: or .* by name",
        lambda: NET.flatten([b, W, s]),
    ),
    "a scalar in the wrong place": (
        ValueError,
        r"shape \(3,\) for 'bias', got \(\); the order is",
        lambda: NET.flatten([W, s, b]),
    ),
    "a transposed weight": (
        ValueError,
        r"shape \(3, 2\) for 'weight', got \(2, 3\)$",
        lambda: NET.flatten({"weight": W.T, "bias": b, "scale": s}),
    ),
    "too few": (
        ValueError,
        "expects 3 tensors, in the order weight, bias, scale, got 2",
        lambda: NET.flatten([W, b]),
    ),
    "a missing and an unknown name": (
        ValueError,
        "none for bias and also head; for a choice of them: {name: tensors",
        lambda: NET.flatten({"weight": W, "head": b, "scale": s}),
    ),
    "one tensor": (TypeError, r"got one tensor of shape \(10,\)", lambda: NET.flatten(FLAT)),
    "an array": (
        TypeError,
        "a tensor for 'bias', got ndarray; use torch.as_tensor",
        lambda: NET.flatten([W, b.numpy(), s]),
    ),
    "columns in some only": (
        ValueError,
        r"in front of every shape, got \(4,\) for 'weight' and \(\) for 'bias'",
        lambda: NET.flatten([entries(4, 3, 2), b, s]),
    ),
    "fewer leading dimensions than said": (
        ValueError,
        r"shape \(3, 2\) after leading dimensions for 'weight', got \(3, 2\)",
        lambda: NET.flatten([W, b, s], lead=1),
    ),
    "columns that are not transposed": (
        ValueError,
        r"expects shape \(\.\.\., 10\), got \(10, 4\); unflatten V.T for columns",
        lambda: NET.unflatten(entries(10, 4)),
    ),
    "one of hundreds": (
        ValueError,
        "l7 and 292 more, got 1;",
        lambda: Layout(tuple(f"l{i}" for i in range(300)), (torch.Size([]),) * 300).flatten([s]),
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_is_no_such_vector_is_refused_in_words_that_help(mistake: str) -> None:
    error, words, do = REFUSED[mistake]
    with pytest.raises(error, match=words):
        do()
