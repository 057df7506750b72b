"""Strategies as objects: agreeing, subclassable, honest about what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hvpop import (
    FiniteDifference,
    ForwardOverReverse,
    HVPStrategy,
    ReverseOverReverse,
)
from hvpop.strategies import LinearMap, Params
from tests.curvature.problems import error, random
from tests.functions import Cube

from .problems import hessian

EXACT: list[type[HVPStrategy]] = [ReverseOverReverse, ForwardOverReverse]
ALL: list[type[HVPStrategy]] = [*EXACT, FiniteDifference]
TOLERANCE = {ReverseOverReverse: 1e-12, ForwardOverReverse: 1e-12, FiniteDifference: 1e-7}

every = pytest.mark.parametrize("strategy", ALL)
exact = pytest.mark.parametrize("strategy", EXACT)


POINT: Params = {"a": random(3), "b": random(2, 2, seed=1), "unused": random(2, seed=2)}
DATA = random(3, seed=3)


def function(params: Params, x: Tensor) -> Tensor:
    """``sum(a^3 x) + sum(a) sum(b^2)``: the Hessian is known on paper."""
    return (params["a"] ** 3 * x).sum() + params["a"].sum() * (params["b"] ** 2).sum()


def expected(v: Params) -> Params:
    a, b = POINT["a"], POINT["b"]
    cross = 2 * (b * v["b"]).sum()
    return {
        "a": 6 * a * DATA * v["a"] + cross,
        "b": 2 * b * v["a"].sum() + 2 * a.sum() * v["b"],
        "unused": torch.zeros(2, dtype=torch.float64),
    }


def direction(seed: int, k: int | None = None) -> Params:
    lead = () if k is None else (k,)
    return {n: random(*lead, *p.shape, seed=seed + i) for i, (n, p) in enumerate(POINT.items())}


@every
def test_a_map_is_the_hessian_times_a_vector(strategy: type[HVPStrategy]) -> None:
    H = strategy().linearize(function, POINT, DATA)
    for seed in (10, 20):  # a map is used more than once
        v = direction(seed)
        product = H(v)
        assert list(product) == list(POINT)
        for name in ("a", "b"):
            assert error(product[name], expected(v)[name]) < TOLERANCE[strategy]
        assert torch.equal(product["unused"], expected(v)["unused"])
        assert not any(p.requires_grad for p in product.values())


@every
@pytest.mark.parametrize("k", [1, 2, 5])
def test_columns_are_products_side_by_side(strategy: type[HVPStrategy], k: int) -> None:
    H = strategy().linearize(function, POINT, DATA)
    V = direction(30, k)
    kept = {name: v.clone() for name, v in V.items()}
    block = H.columns(V)
    for j in range(k):
        single = H({name: v[j] for name, v in V.items()})
        assert all(torch.allclose(block[n][j], single[n], rtol=1e-12) for n in POINT)
    assert all(block[n].shape == (k, *p.shape) for n, p in POINT.items())
    assert all(torch.equal(V[n], kept[n]) for n in V)


@every
def test_the_point_is_neither_written_to_nor_marked(strategy: type[HVPStrategy]) -> None:
    point = {n: p.clone() for n, p in POINT.items()}
    strategy().linearize(function, point, DATA)(direction(10))
    assert all(torch.equal(point[n], POINT[n]) for n in POINT)
    assert not any(p.requires_grad for p in point.values())
    assert all(p.grad is None for p in point.values())


@every
def test_functions_without_curvature_give_zeros(strategy: type[HVPStrategy]) -> None:
    for flat in (
        lambda p: sum(x.sum() for x in p.values()),
        lambda p: torch.ones((), dtype=torch.float64),
        lambda p: p["a"].sum() + DATA.sum(),
    ):
        H = strategy().linearize(flat, POINT)
        assert all(torch.count_nonzero(x) == 0 for x in H(direction(10)).values())
        assert all(torch.count_nonzero(x) == 0 for x in H.columns(direction(10, 3)).values())


@every
def test_a_zero_vector_gives_zeros(strategy: type[HVPStrategy]) -> None:
    zero = {name: torch.zeros_like(p) for name, p in POINT.items()}
    product = strategy().linearize(function, POINT, DATA)(zero)
    assert all(torch.count_nonzero(x) == 0 for x in product.values())


@exact
def test_differentiable_products_have_a_third_derivative(strategy: type[HVPStrategy]) -> None:
    point = {name: p.clone().requires_grad_() for name, p in POINT.items()}
    H = strategy().linearize(function, point, DATA, differentiable=True)
    v, u = direction(10), direction(20)
    slope = sum((u[name] * product).sum() for name, product in H(v).items())
    a, b = torch.autograd.grad(slope, [point["a"], point["b"]], retain_graph=True)
    assert error(a, 6 * DATA * v["a"] * u["a"] + 2 * (v["b"] * u["b"]).sum()) < 1e-12
    cross = 2 * v["b"] * u["a"].sum() + 2 * u["b"] * v["a"].sum()
    assert error(b, cross) < 1e-12
    block = H.columns({name: torch.stack((v[name], u[name])) for name in v})
    (again,) = torch.autograd.grad((block["a"][0] * u["a"]).sum(), [point["a"]])
    assert error(again, 6 * DATA * v["a"] * u["a"]) < 1e-12


def test_finite_differences_are_differentiable_too() -> None:
    point = {name: p.clone().requires_grad_() for name, p in POINT.items()}
    H = FiniteDifference().linearize(function, point, DATA, differentiable=True)
    v = direction(10)
    (a,) = torch.autograd.grad(H(v)["a"].sum(), [point["a"]])
    assert error(a, 6 * DATA * v["a"]) < 1e-5


@every
@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(strategy: type[HVPStrategy], caller: Any) -> None:
    v = direction(10)
    with caller():
        product = strategy().linearize(function, POINT, DATA)(v)
    assert error(product["a"].clone(), expected(v)["a"]) < TOLERANCE[strategy]


# -- finite differences -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_step_scales_with_the_vector_and_the_parameters(scale: float) -> None:
    def quartic(params: Params) -> Tensor:
        return ((params["w"] / scale) ** 4).sum() + 0 * params["w"].sum()

    w, v = scale * (1 + random(5).abs()), random(5, seed=1)
    for length in (1e-8, 1.0, 1e8):
        product = FiniteDifference().linearize(quartic, {"w": w})({"w": length * v})["w"]
        truth = 12 * (w / scale) ** 2 * length * v / scale**2
        # The step is absolute below parameters of norm one, so it is too long for tiny ones.
        if scale >= 1:
            assert error(product, truth) < 1e-7


def test_a_step_can_be_chosen() -> None:
    """On a cubic the central difference is exact but for rounding, whatever the step."""
    v = direction(10)
    for step in (1e-2, 1e-4):
        product = FiniteDifference(step=step).linearize(function, POINT, DATA)(v)
        assert error(product["a"], expected(v)["a"]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_differences_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(
        TypeError, match=r"needs float32 or float64 parameters, got torch\..*16; con"
    ):
        FiniteDifference().linearize(function, {"a": torch.ones(3, dtype=dtype)}, DATA)


# -- strategies of one's own ----------------------------------------------------------------------------


class Rows(HVPStrategy):
    """The dense Hessian, built once: a strategy as a user would write it."""

    def linearize(
        self, fn: Callable[..., Tensor], params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        names = list(params)
        sizes = [p.numel() for p in params.values()]

        def flat(x: Tensor) -> Tensor:
            pieces = zip(names, x.split(sizes), strict=True)
            return fn({n: piece.view_as(params[n]) for n, piece in pieces}, *args)

        x = torch.cat([p.reshape(-1) for p in params.values()]).detach()
        H = torch.autograd.functional.hessian(flat, x)

        class Dense(LinearMap):
            def __call__(self, v: Params) -> Params:
                y = H @ torch.cat([v[n].reshape(-1) for n in names])
                pieces = zip(names, y.split(sizes), strict=True)
                return {n: piece.view_as(params[n]) for n, piece in pieces}

        return Dense()


def test_a_strategy_of_the_users_works_everywhere() -> None:
    H, reference = hessian(Rows()), hessian(None).to_dense()
    V = random(26, 3)
    assert error(H @ V, reference @ V) < 1e-12
    assert error(H @ V[:, 0], reference @ V[:, 0]) < 1e-12
    assert error(H.linearize() @ V, reference @ V) < 1e-12
    assert repr(H.strategy) == "Rows()"
    assert "Rows()" in repr(H)


def test_a_strategy_can_wrap_another() -> None:
    class Counted(ReverseOverReverse):
        maps = 0

        def linearize(self, *args: Any, **settings: Any) -> LinearMap:
            self.maps += 1
            return super().linearize(*args, **settings)

    strategy = Counted()
    hessian(strategy) @ random(26)
    assert strategy.maps > 0


@every
def test_a_strategy_shows_what_it_is(strategy: type[HVPStrategy]) -> None:
    assert repr(strategy()) == f"{strategy.__name__}()"


@every
def test_all_strategies_agree_with_the_default(strategy: type[HVPStrategy]) -> None:
    V = random(26, 3)
    assert error(hessian(strategy()) @ V, hessian(None) @ V) < TOLERANCE[strategy]


def test_columns_go_one_by_one_where_a_batching_rule_fails_in_any_way() -> None:
    class Failing(Cube):
        """The cube of a number, whose second derivative is written for one column only."""

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            try:
                float(g.detach()[0])
            except RuntimeError:  # one of several columns has no value
                raise KeyError("one column only") from None
            return Cube.backward(ctx, g)

    w = torch.tensor([2.0, -1.0], dtype=torch.float64)
    V = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    functions: list[tuple[Callable[[Params], Tensor], Tensor]] = [
        (lambda p: sum(x.unfold(0, 1, 1).pow(3).sum() for x in p["w"]), 6 * w),
        (lambda p: Failing.apply(p["w"]).square().sum(), 30 * w**4),
    ]
    for function, curvature in functions:
        strategy = ReverseOverReverse()
        product = strategy.linearize(function, {"w": w}).columns({"w": V})["w"]
        torch.testing.assert_close(product, curvature * V)
        assert strategy.batches_columns is False
