"""Each refusal by its message: who, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpop import (
    TOTAL,
    Average,
    EmpiricalRisk,
    ForwardOverReverse,
    HessianOperator,
    ReverseOverReverse,
    block_diagonal,
)
from hvpop.risk import hugging_face
from hvpop.strategies import NoSecondDerivativeError

from .problems import mlp, random, regression, split

DATA = split(regression(), (10, 10, 3))
SELECTIONS = "there are 0.weight, 0.bias, 2.weight, 2.bias"


def product(model: Any = None, loss: Any = None, data: Any = DATA, **settings: Any) -> Tensor:
    model = mlp() if model is None else model
    H = HessianOperator(model, nn.MSELoss() if loss is None else loss, data, **settings)
    return H @ random(H.shape[1])


def hessian() -> HessianOperator:
    return HessianOperator(mlp(), nn.MSELoss(), DATA)


def batch_product(batch_loss: Any, data: Any, model: Any = None) -> Tensor:
    risk = EmpiricalRisk.from_batch_loss(mlp() if model is None else model, batch_loss, data)
    H = HessianOperator.from_risk(risk)
    return H @ random(H.shape[1])


class NoLoss(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=None)


REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no trainable parameter": (
        lambda: product(mlp().requires_grad_(False)),
        ValueError,
        r"no trainable parameter: none has requires_grad=True; call model.requires_grad_\(True\)",
    ),
    "no parameter": (lambda: product(nn.Tanh()), ValueError, "no trainable parameter"),
    "no module": (
        lambda: product(lambda x: x),
        TypeError,
        "model must be a torch.nn.Module, got function",
    ),
    "no loss": (
        lambda: product(loss="mse"),
        TypeError,
        r"loss must be callable as loss\(outputs, targets\), got str",
    ),
    "a class of losses": (
        lambda: product(loss=nn.MSELoss),
        TypeError,
        r"callable as loss\(outputs, targets\), got the class MSELoss",
    ),
    "blocks by an unknown rule": (
        lambda: block_diagonal(hessian(), by="neuron"),  # type: ignore[arg-type]
        ValueError,
        r"expects by in \('layer', 'parameter'\) or a function, got 'neuron'",
    ),
    "blocks of a sum": (
        lambda: block_diagonal(hessian() + hessian()),
        TypeError,
        "block_diagonal expects a HessianOperator, got <43x43 Sum",
    ),
    "no batch loss": (lambda: batch_product(3, DATA), TypeError, "must be callable, got int"),
    "vector loss": (
        lambda: product(loss=lambda out, y: (out - y).square()),
        ValueError,
        r"loss must be a scalar, got shape \(10, 3\); reduce it, e.g. with .mean\(\)",
    ),
    "number as loss": (
        lambda: product(loss=lambda out, y: 1.0),
        TypeError,
        "the loss must be a tensor, got float",
    ),
    "integer loss": (
        lambda: product(loss=lambda out, y: (out > 0).sum()),
        TypeError,
        "real floating point, got torch.int64",
    ),
    "complex loss": (
        lambda: product(loss=lambda out, y: (out * 1j).sum()),
        TypeError,
        "real floating point, got torch.complex128",
    ),
    "summed loss": (
        lambda: product(loss=nn.MSELoss(reduction="sum")),
        ValueError,
        "MSELoss has reduction='sum', which average=SAMPLES .* use .*'mean', or average=TOTAL",
    ),
    "summed function": (
        lambda: product(loss=partial(F.mse_loss, reduction="sum")),
        ValueError,
        "mse_loss has reduction='sum'",
    ),
    "summed subclass": (
        lambda: product(loss=type("Mine", (nn.HuberLoss,), {})(reduction="sum")),
        ValueError,
        "Mine has reduction='sum'",
    ),
    "unreduced loss": (
        lambda: product(loss=nn.MSELoss(reduction="none")),
        ValueError,
        "reduction='none': a loss must be a scalar",
    ),
    "unreduced loss, summed": (
        lambda: product(loss=nn.MSELoss(reduction="none"), average=TOTAL),
        ValueError,
        r"must be a scalar, got shape \(10, 3\)",
    ),
    "strategy as text": (
        lambda: product(strategy="reverse"),
        TypeError,
        r"strategy must be an HVPStrategy object, got 'reverse'; .*=ForwardOverReverse\(\)",
    ),
    "strategy as class": (
        lambda: product(strategy=ReverseOverReverse),
        TypeError,
        "strategy must be an HVPStrategy object, got <class",
    ),
    "unknown mode": (
        lambda: product(mode="both"),
        ValueError,
        "mode must be 'batch' or 'full', got 'both'",
    ),
    "average as text": (
        lambda: product(average="samples"),
        TypeError,
        r"average must be SAMPLES, BATCHES, TOTAL or Average\(...\), got 'samples'",
    ),
    "negative weight": (
        lambda: product(average=Average(weight=lambda batch: -1)),
        ValueError,
        "a batch has weight -1.0; weights must be finite non-negative numbers",
    ),
    "infinite weight": (
        lambda: product(average=Average(weight=lambda batch: float("inf"))),
        ValueError,
        "a batch has weight inf",
    ),
    "no weight": (
        lambda: product(average=Average(weight=lambda batch: float("nan"))),
        ValueError,
        "a batch has weight nan",
    ),
    "all weights zero": (
        lambda: product(average=Average(weight=lambda batch: 0)),
        ValueError,
        "all batches have weight 0",
    ),
    "all weights zero, full": (
        lambda: product(average=Average(weight=lambda batch: 0), mode="full"),
        ValueError,
        "all batches have weight 0",
    ),
    "all ignored": (
        lambda: product(
            loss=nn.CrossEntropyLoss(), data=[(random(4, 4), torch.full((4,), -100))] * 2
        ),
        ValueError,
        "all batches have weight 0",
    ),
    "uncountable batch": (
        lambda: batch_product(lambda m, b: m(b.x).mean(), [SimpleNamespace(x=random(2, 4))]),
        ValueError,
        r"how many samples a SimpleNamespace holds; pass average=Average\(weight=...\)",
    ),
    "batch without targets": (
        lambda: product(data=[random(2, 4)]),
        ValueError,
        r"must be \(inputs, targets\), got Tensor; for other batches use EmpiricalRisk.from_batch",
    ),
    "mapping without targets": (
        lambda: product(data=[{"x": random(2, 4), "y": random(2, 3)}]),
        ValueError,
        r"without 'labels' \(it has x, y\); name its targets with .*supervised\(loss, targets",
    ),
    "model without loss": (
        lambda: batch_product(hugging_face(), [{"x": random(2, 4)}], NoLoss(4, 3).double()),
        ValueError,
        "NoLoss returned no loss: its batches need labels, got x",
    ),
    "complex parameter": (
        lambda: product(nn.Linear(4, 3, dtype=torch.complex128)),
        TypeError,
        r"parameter weight is complex \(torch.complex128\).*view_as_real",
    ),
    "unknown name": (
        lambda: product(params="1.weight"),
        ValueError,
        f"params='1.weight' matches no trainable parameter; {SELECTIONS}",
    ),
    "one unknown name": (
        lambda: product(params=["0.*", "head"]),
        ValueError,
        f"params='head' matches no trainable parameter; {SELECTIONS}",
    ),
    "foreign module": (
        lambda: product(params=nn.Linear(2, 2)),
        ValueError,
        f"params=<Linear> matches no trainable parameter; {SELECTIONS}",
    ),
    "predicate that selects nothing": (
        lambda: product(params=lambda name, p: False),
        ValueError,
        "params=<function> matches no trainable parameter",
    ),
    "empty selection": (
        lambda: product(params=[]),
        ValueError,
        "params= is empty; choose from 0.w",
    ),
    "selection of a kind unknown": (
        lambda: product(params=5),
        TypeError,
        "params= takes names, globs, modules, parameters or a predicate .*, got int",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_is_wrong_and_what_to_do(name: str) -> None:
    attempt, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        attempt()


def test_all_but_the_loss_is_refused_before_any_data_is_read() -> None:
    """With the data a generator that fails when it is read."""

    def untouchable() -> Any:
        raise AssertionError
        yield

    for name in ("no trainable parameter", "summed loss", "unknown name", "strategy as text"):
        attempt, kind, message = REFUSALS[name]
        with pytest.raises(kind, match=message):
            attempt()
    HessianOperator(mlp(), nn.MSELoss(), untouchable())


# -- models that change ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (lambda model: model.append(nn.Linear(3, 3).double()), "6 with 55"),
        (lambda model: model[0].requires_grad_(False), "2 with 18"),
        (lambda model: model.pop(0), "2 with 18"),
        (lambda model: model.__setitem__(0, nn.Linear(4, 5, bias=False).double()), "3 with 38"),
        (lambda model: model.insert(0, nn.Identity()), "4 with 43"),
    ],
    ids=["layer added", "layer frozen", "layer gone", "bias gone", "layers renamed"],
)
def test_an_operator_of_a_model_that_is_another_now_says_so(change: Any, now: str) -> None:
    model = mlp()
    H = HessianOperator(model, nn.MSELoss(), DATA)
    change(model)
    message = rf"parameters changed since .* \(then 4 with 43 entries, now {now}\); build a"
    for use in (lambda: H @ random(43), H.linearize):
        with pytest.raises(RuntimeError, match=message):
            use()


@pytest.mark.parametrize("seed", [1.5, -1, 2**63, True, None, "0"])
def test_a_seed_that_torch_could_not_use_is_refused_at_once(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 2"):
        HessianOperator(mlp(), nn.MSELoss(), DATA, seed=seed)


def test_forward_mode_inside_of_forward_mode_is_named() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: (x @ self.w).tanh(), (x,), (torch.ones_like(x),))[1]

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = [(x, torch.zeros(4, 2, dtype=torch.float64))]
    with pytest.raises(NoSecondDerivativeError, match="uses forward mode itself"):
        product(Slope(), data=data, strategy=ForwardOverReverse())
    assert product(Slope(), data=data).isfinite().all()
