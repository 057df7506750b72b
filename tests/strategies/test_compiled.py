"""`Compiled`: the traced product is the wrapped strategy's, does less, and gives way where it cannot."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from hvpop.strategies import LinearMap, Params, ReverseOverReverse
from hvpop.strategies.compiled import Compiled
from hvpop.strategies.compiling import program as programs
from hvpop.strategies.compiling.buffers import fuse_additions, reuse_buffers, wait_for_readers

TOLERANCE = 1e-12  # relative; a few thousand roundings of 1e-16 each


class Residual(nn.Module):
    """Strided convolutions that leave rows over, group norm, a 1x1 shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.skip = nn.Conv2d(2, 4, 1, stride=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.first(x)))
        h = F.silu(self.second(h) + self.skip(x))
        return self.head(F.softplus(self.grouped(h)).mean((2, 3)))


class Attention(nn.Module):
    """Embedding tied to the head, layer norm, causal attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        q, k, v = (
            t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(x)))
        return (x @ self.token.weight.T).flatten(0, 1)


class Masked(nn.Module):
    """Weights of a softmax and values of which some are masked; logits come as the loss takes them."""

    future = torch.ones(5, 5).triu(1).bool()
    some = torch.arange(40).reshape(5, 8) % 3 == 0

    def __init__(self) -> None:
        super().__init__()
        self.token, self.qkv = nn.Embedding(7, 8), nn.Linear(8, 24)
        self.head = nn.Linear(8, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.token(tokens)).chunk(3, -1)
        scores = (q @ k.mT / 8**0.5).masked_fill(self.future, -math.inf)
        x = scores.softmax(-1) @ v.masked_fill(self.some, 0)
        x = x + (scores.masked_fill(self.future, 0).sin().masked_fill(self.future.mT, 0) @ v).tanh()
        return self.head(x.masked_fill(x.detach() > 1, 0.5)).mT


class Recurrent(nn.Module):
    """A cell written with in-place arithmetic on its own temporaries."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.recur, self.leave = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 5)
        states = x.new_empty(x.shape[1], x.shape[0], 5)
        for i, step in enumerate(x.unbind(1)):
            h = self.enter(step).add_(self.recur(h)).sigmoid_()
            states[i] = h
        return self.leave(states.mean(0))


def cross_entropy(model: nn.Module) -> Callable[..., Tensor]:
    return lambda p, x, y: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y)


def problem(name: str, batches: int = 1) -> tuple[Callable[..., Tensor], Params, list[Any]]:
    """A function, its point, and data; float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "residual":
            model: nn.Module = Residual()
            data = [(torch.randn(3, 2, 8, 8).double(), torch.tensor([0, 2, 1]))] * batches
        elif name == "attention":
            model = Attention()
            data = [(torch.randint(7, (2, 5)), torch.randint(7, (10,))) for _ in range(batches)]
        elif name == "masked":
            model = Masked()
            data = [(torch.randint(7, (2, 5)), torch.randint(7, (2, 5))) for _ in range(batches)]
        elif name == "recurrent":
            model = Recurrent()
            data = [(torch.randn(4, 6, 3).double(), torch.randint(3, (4,))) for _ in range(batches)]
        else:
            model = nn.Sequential(
                nn.Linear(4, 6),
                nn.Tanh(),
                nn.BatchNorm1d(6),
                nn.Linear(6, 6),
                nn.ELU(),
                nn.Linear(6, 3),
            ).eval()
            data = [(torch.randn(5, 4).double(), torch.randint(3, (5,))) for _ in range(batches)]
        model = model.double()
        params = {name: p.detach() for name, p in model.named_parameters()}
    return cross_entropy(model), params, data


def directions(params: Params, *k: int, seed: int = 1) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(*k, *p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()
    }


class Recording(TorchDispatchMode):
    """The operations that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((op.overloadpacket.__name__, args))
        return op(*args, **(kwargs or {}))


def assert_same(result: Params, expected: Params, tolerance: float = TOLERANCE) -> None:
    assert result.keys() == expected.keys()
    size = torch.stack([t.norm() for t in expected.values()]).norm()
    for name, tensor in expected.items():
        assert result[name].shape == tensor.shape
        assert float((result[name] - tensor).norm()) <= tolerance * size, name


MODELS = ["dense", "residual", "attention", "masked", "recurrent"]


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_double_backward(name: str) -> None:
    fn, params, [batch] = problem(name)
    strategy = Compiled(compiler=False)
    H = strategy.linearize(fn, params, *batch)
    expected = ReverseOverReverse().linearize(fn, params, *batch)
    for seed in (1, 2, 3):  # a graph that overwrites its constants is right for the first only
        v = directions(params, seed=seed)
        assert_same(H(v), expected(v))
    assert strategy.fallback_reason is None


@pytest.mark.parametrize("name", MODELS)
def test_columns_are_products(name: str) -> None:
    fn, params, [batch] = problem(name)
    strategy = Compiled(compiler=False)
    H = strategy.linearize(fn, params, *batch)
    expected = ReverseOverReverse().linearize(fn, params, *batch)
    for k in (1, 3, 14):  # one by one; a block, and one filled up
        V = directions(params, k)
        for _ in range(2):
            result = H.columns(V)
            for j in range(k):
                v = {n: column[j] for n, column in V.items()}
                assert_same({n: column[j] for n, column in result.items()}, expected(v))
    assert strategy.fallback_reason is None


def run_by(H: LinearMap, v: Params) -> list[tuple[str, tuple[Any, ...]]]:
    """The ops of a product, and what they are given, once all is prepared."""
    H(v)
    with Recording() as recording:
        H(v)
    return recording.seen


def test_what_does_not_depend_on_v_is_computed_once_for_a_point() -> None:
    fn, params, [batch] = problem("dense")
    H = Compiled(compiler=False).linearize(fn, params, *batch)
    seen = run_by(H, directions(params))
    names = [name for name, _ in seen]
    once = {"tanh", "tanh_backward", "elu", "elu_backward", "_log_softmax", "exp", "sqrt"}
    assert once.isdisjoint(names)
    # 6 products for a layer, but 2 for the first: nobody asks for the gradient of the data.
    assert sum(name.rstrip("_") in ("mm", "addmm") for name in names) == 2 + 6 + 6


def test_gradients_of_kernels_are_not_made_by_convolving_over_the_batch() -> None:
    fn, params, [batch] = problem("residual")
    H = Compiled(compiler=False).linearize(fn, params, *batch)
    seen = run_by(H, directions(params))
    kernels = [args[1].shape for name, args in seen if name == "convolution"]
    assert kernels
    # Exception: double backward goes over the groups of a grouped convolution one by one.
    assert {tuple(k[2:]) for k in kernels if k[0] > 2} <= {(3, 3), (1, 1)}


def test_what_is_masked_before_a_softmax_is_not_masked_once_more() -> None:
    def fn(p: Params, x: Tensor) -> Tensor:
        scores = (p["q"] @ x / 3).masked_fill(Masked.future, -math.inf)
        return (scores.softmax(-1) @ x.sin()).square().sum()

    params = directions({"q": torch.empty(4, 5, 5, dtype=torch.float64)}, seed=0)
    x = directions({"x": params["q"][0]}, seed=2)["x"]
    H = Compiled(compiler=False).linearize(fn, params, x)
    v = directions(params)
    assert_same(H(v), ReverseOverReverse().linearize(fn, params, x)(v))
    assert "masked_fill" not in {name.rstrip("_") for name, _ in run_by(H, v)}


def test_residuals_lie_as_what_they_are_multiplied_with() -> None:
    fn, params, [batch] = problem("masked")
    H = Compiled(compiler=False).linearize(fn, params, *batch)
    seen = run_by(H, directions(params))
    logits = [
        [a.stride() for a in args if isinstance(a, Tensor) and a.shape == (2, 7, 5)]
        for name, args in seen
        if name.rstrip("_") in ("mul", "addcmul", "add")
    ]
    assert any(logits)
    assert all(len(set(strides)) <= 1 for strides in logits)


def test_heads_of_attention_are_copied_in_the_order_of_their_memory() -> None:
    def fn(p: Params, x: Tensor) -> Tensor:
        q, k, v = (x @ p["w"]).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).sin().sum()

    params = directions({"w": torch.empty(6, 24, dtype=torch.float64)}, seed=0)
    x = directions({"x": torch.empty(2, 5, 6, dtype=torch.float64)}, seed=2)["x"]
    H, v = Compiled(compiler=False).linearize(fn, params, x), directions(params)
    assert_same(H(v), ReverseOverReverse().linearize(fn, params, x)(v))
    copied = [
        part
        for name, args in run_by(H, v)
        if name in ("clone", "copy_", "stack", "cat")
        for part in (args[0] if isinstance(args[0], list) else [args[0]])
        if part.dim() > 2
    ]
    assert len(copied) >= 3
    assert all(part.stride(-1) == 1 for part in copied)


def test_a_function_is_traced_once_for_batches_of_one_shape() -> None:
    fn, params, data = problem("dense", batches=3)
    calls = 0

    def counted(p: Params, x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return fn(p, x, y)

    strategy = Compiled(compiler=False)
    v = directions(params)
    strategy.linearize(counted, params, *data[0])(v)
    traced = calls
    for batch in data:
        H = strategy.linearize(counted, params, *batch)
        assert_same(H(v), ReverseOverReverse().linearize(fn, params, *batch)(v))
    assert calls == traced
    x, y = data[0]
    shorter = strategy.linearize(counted, params, x[:3], y[:3])
    assert_same(shorter(v), ReverseOverReverse().linearize(fn, params, x[:3], y[:3])(v))
    assert calls > traced


def test_a_trace_is_for_the_values_of_what_is_not_a_tensor() -> None:
    strategy = Compiled(compiler=False)
    point = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    for power in (2, 3, 2):
        H = strategy.linearize(lambda p, n: (p["w"] ** n).sum(), point, power)
        expected = power * (power - 1) * point["w"] ** (power - 2)
        assert_same(H({"w": torch.ones(2, dtype=torch.float64)}), {"w": expected})


def test_terms_that_vanish_do_no_harm() -> None:
    def fn(p: Params) -> Tensor:
        a, b = p["a"], p["b"]
        return (0 * a * b + a * b - a * b + b**3 + 0.0 * (a * b).sin()).sum()

    params = {n: torch.tensor([1.0, 2.0], dtype=torch.float64) for n in ("a", "b")}
    v = directions(params)
    result = Compiled(compiler=False).linearize(fn, params)(v)
    assert_same(result, {"a": 0 * v["a"], "b": 6 * params["b"] * v["b"]})


def test_maps_of_one_trace_do_not_touch_each_other() -> None:
    fn, params, data = problem("dense", batches=2)
    strategy = Compiled(compiler=False)
    maps = [strategy.linearize(fn, params, *batch) for batch in data]
    v = directions(params)
    first = {n: t.clone() for n, t in maps[0](v).items()}
    maps[1](v)
    assert_same(maps[0](v), first, tolerance=0.0)


def test_a_tensor_that_the_function_captures_is_read_anew_for_each_map() -> None:
    scale = torch.tensor(1.0, dtype=torch.float64)
    point = {"w": torch.ones(2, dtype=torch.float64)}
    fn = lambda p: scale * (p["w"] ** 2).sum()  # noqa: E731
    strategy = Compiled(compiler=False)
    assert_same(strategy.linearize(fn, point)(point), {"w": 2 * point["w"]})
    scale.fill_(3.0)
    assert_same(strategy.linearize(fn, point)(point), {"w": 6 * point["w"]})


def test_results_are_the_callers_to_change() -> None:
    point = {n: torch.ones(2, dtype=torch.float64) for n in ("a", "b", "unused")}
    H = Compiled(compiler=False).linearize(lambda p: ((p["a"] + p["b"]) ** 2).sum() / 2, point)
    v = directions(point)
    kept = {n: t.clone() for n, t in v.items()}
    both = v["a"] + v["b"]
    expected = {"a": both, "b": both, "unused": torch.zeros_like(both)}
    for _ in range(2):
        result = H(v)
        assert_same(result, expected)
        for tensor in result.values():
            tensor.add_(1)
        assert_same(v, kept, tolerance=0.0)


def test_batches_stacked_by_vmap_inside_the_function_are_traced_too() -> None:
    fn, params, data = problem("dense", batches=3)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def stacked(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return (weights * torch.vmap(fn, in_dims=(None, 0, 0))(p, x, y)).sum()

    strategy = Compiled(compiler=False)
    H = strategy.linearize(
        stacked, params, *(torch.stack(part) for part in zip(*data, strict=True))
    )
    v = directions(params)
    products = [ReverseOverReverse().linearize(fn, params, *batch)(v) for batch in data]
    expected = {n: sum(w * y[n] for w, y in zip(weights, products, strict=True)) for n in params}
    assert_same(H(v), expected)
    assert strategy.fallback_reason is None


def test_the_mode_of_the_caller_makes_no_difference() -> None:
    fn, params, [batch] = problem("dense")
    v = directions(params)
    expected = ReverseOverReverse().linearize(fn, params, *batch)(v)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            strategy = Compiled(compiler=False)
            result = strategy.linearize(fn, params, *batch)(v)
        assert_same(result, expected)
        assert not any(t.requires_grad or t.is_inference() for t in result.values())
        assert strategy.fallback_reason is None


def test_residual_bytes_count_what_is_not_the_users() -> None:
    generator = torch.Generator().manual_seed(0)
    A, X = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (3, 6))
    point = {"w": torch.ones(3, dtype=torch.float64)}
    form = lambda p, A: p["w"] @ A @ p["w"]  # noqa: E731
    assert Compiled(compiler=False).linearize(form, point, A).residual_bytes <= 8  # no copy of A
    tanh = lambda p, X: (X @ p["w"]).tanh().sum()  # noqa: E731
    assert Compiled(compiler=False).linearize(tanh, point, X).residual_bytes == 6 * 8


def test_what_it_cannot_wrap_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expects an hvpop\.HVPStrategy to wrap, got str"):
        Compiled("reverse")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compiler as True or False, got 'no'"):
        Compiled(compiler="no")  # type: ignore[arg-type]


def test_differentiable_products_come_from_the_strategy() -> None:
    fn, params, [batch] = problem("dense")
    point = {n: p.clone().requires_grad_() for n, p in params.items()}
    H = Compiled(compiler=False).linearize(fn, point, *batch, differentiable=True)
    assert all(t.requires_grad for t in H(directions(params)).values())


# -- falling back ------------------------------------------------------------------------------------


def _random(p: Params) -> Tensor:
    return (F.dropout(p["w"], 0.5) ** 3).sum()


def _branching(p: Params) -> Tensor:
    return (p["w"] ** (3 if p["w"].sum() > 0 else 2)).sum()


COUNTER = torch.zeros((), dtype=torch.float64)


def _writing(p: Params) -> Tensor:
    COUNTER.add_(1)
    return (p["w"] ** 3).sum() + 0 * COUNTER


@pytest.mark.parametrize(
    ("fn", "reason"),
    [(_random, "random"), (_branching, "traced"), (_writing, "writes to")],
    ids=["random", "branching", "writing"],
)
def test_what_cannot_be_traced_goes_to_the_strategy_with_one_warning(
    fn: Callable[..., Tensor], reason: str
) -> None:
    strategy = Compiled(compiler=False)
    point = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    with pytest.warns(UserWarning, match=reason) as caught:
        H = strategy.linearize(fn, point)
    assert len(caught) == 1
    assert reason in str(strategy.fallback_reason)
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        mask = (
            F.dropout(torch.ones(2, dtype=torch.float64), 0.5) if fn is _random else torch.ones(2)
        )
        torch.manual_seed(0)
        H = strategy.linearize(fn, point)  # silently from now on
        assert_same(H({"w": torch.ones(2).double()}), {"w": 6 * point["w"] * mask.double() ** 3})


def test_arguments_that_a_trace_cannot_see_into_go_to_the_strategy() -> None:
    class Opaque:
        scale = 3.0

    strategy = Compiled(compiler=False)
    point = {"w": torch.ones(2, dtype=torch.float64)}
    with pytest.warns(UserWarning, match="Opaque"):
        H = strategy.linearize(lambda p, o: o.scale * (p["w"] ** 2).sum(), point, Opaque())
    assert_same(H(point), {"w": 6 * point["w"]})


def test_a_trace_that_disagrees_is_dropped_and_the_right_product_returned() -> None:
    calls = 0

    def changing(p: Params) -> Tensor:
        nonlocal calls
        calls += 1
        return (p["w"] ** 2).sum() * (1 if calls == 1 else 5)  # the first call is the trace

    strategy = Compiled(compiler=False)
    point = {"w": torch.ones(2, dtype=torch.float64)}
    H = strategy.linearize(changing, point)
    with pytest.warns(UserWarning, match="disagreed") as caught:
        assert_same(H(point), {"w": 10 * point["w"]})
    assert len(caught) == 1
    assert_same(strategy.linearize(changing, point)(point), {"w": 10 * point["w"]})
    assert_same(
        H.columns({"w": torch.ones(3, 2).double()}), {"w": torch.full((3, 2), 10.0).double()}
    )


def test_columns_that_disagree_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, params, [batch] = problem("dense")
    strategy = Compiled(compiler=False)
    H = strategy.linearize(fn, params, *batch)
    V = directions(params, 8)
    zeros = [torch.zeros_like(t) for t in V.values()]
    monkeypatch.setattr(programs.Program, "_vectorized", lambda *_: lambda *_: zeros)
    with pytest.warns(UserWarning, match="several columns disagreed"):
        result = H.columns(V)
    assert_same(result, ReverseOverReverse().linearize(fn, params, *batch).columns(V))


def test_columns_of_an_op_without_a_batching_rule_go_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Batching rule not implemented")

    fn, params, [batch] = problem("dense")
    H = Compiled(compiler=False).linearize(fn, params, *batch)
    monkeypatch.setattr(programs.torch, "vmap", refuse)
    V = directions(params, 8)
    with pytest.warns(UserWarning, match="one by one"):
        result = H.columns(V)
    monkeypatch.undo()
    assert_same(result, ReverseOverReverse().linearize(fn, params, *batch).columns(V))


# -- the compiler ------------------------------------------------------------------------------------


def test_compiled_products_are_those_of_double_backward() -> None:
    fn, params, [batch] = problem("dense")
    strategy = Compiled()
    H = strategy.linearize(fn, params, *batch)
    expected = ReverseOverReverse().linearize(fn, params, *batch)
    v, V = directions(params), directions(params, 11)
    assert_same(H(v), expected(v))
    assert_same(H.columns(V), expected.columns(V))
    assert strategy.fallback_reason is None


def test_numbers_in_front_of_matrix_products_survive_the_compiler() -> None:
    def fn(p: Params, x: Tensor) -> Tensor:
        return (((x @ p["A"]).tanh() / 4 @ p["B"]) / 8).tanh().square().sum()

    generator = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(*n, generator=generator).double() for n in ((3, 4), (4, 2), (5, 3)))
    params = {"A": A, "B": B}
    strategy = Compiled()
    v = directions(params)
    result = strategy.linearize(fn, params, x)(v)
    assert_same(result, ReverseOverReverse().linearize(fn, params, x)(v))
    assert strategy.fallback_reason is None


def test_without_a_working_compiler_the_traced_graph_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(programs, "_compiled", broken)
    fn, params, [batch] = problem("dense")
    strategy = Compiled()
    H = strategy.linearize(fn, params, *batch)
    v = directions(params)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found"):
        result = H(v)
    assert_same(result, ReverseOverReverse().linearize(fn, params, *batch)(v))


def test_what_is_at_hand_is_computed_where_it_is_read() -> None:
    def product(r: Tensor, v: Tensor) -> Tensor:
        early = torch.mm(v.t(), r)
        later = torch.mm(torch.mm(v, r).sin(), r)
        return later + early + early.t()

    traced = make_fx(product)(torch.eye(3), torch.ones(3, 3))
    expected = traced(torch.eye(3), torch.arange(9.0).reshape(3, 3))
    wait_for_readers(traced)
    traced.graph.lint()
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert [name.removeprefix("aten.") for name in names[:4]] == [
        "mm.default",
        "sin.default",
        "mm.default",
        "t.default",
    ]
    torch.testing.assert_close(traced(torch.eye(3), torch.arange(9.0).reshape(3, 3)), expected)


def on_arange(traced: Any, *n: int) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = traced(*(torch.arange(float(i * i)).reshape(i, i) for i in n))
    return result


def test_a_view_of_what_is_read_no_more_is_written_into() -> None:
    def product(r: Tensor, v: Tensor) -> list[Tensor]:
        h, late = torch.mm(r, v), torch.mm(v, r)
        wide, early = h.reshape(2, 8), late.reshape(2, 8)
        read = h.sin()
        return [wide * r.reshape(2, 8), read, early * 2.0, late]

    traced = make_fx(product, tracing_mode="fake")(torch.ones(4, 4), torch.ones(4, 4))
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    expected = on_arange(traced, 4, 4)
    reuse_buffers(traced)
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert names.count("aten.mul_.Tensor") == 1
    assert names.count("aten.mul.Tensor") == 1  # what it would write into is a result, too
    torch.testing.assert_close(on_arange(traced, 4, 4), expected)


@pytest.mark.parametrize("alpha", [1, 0.5])
def test_the_later_of_two_matrix_products_is_added_to_the_earlier(alpha: float) -> None:
    def product(r: Tensor, v: Tensor) -> list[Tensor]:
        early = torch.mm(v.sin(), r)
        later = torch.mm(r, v.cos())
        return [torch.add(later, early, alpha=alpha)]

    traced = make_fx(product, tracing_mode="fake")(torch.ones(3, 3), torch.ones(3, 3))
    expected = on_arange(traced, 3, 3)
    fuse_additions(traced)
    (product_left,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product_left.args[0].target is torch.ops.aten.sin.default
    torch.testing.assert_close(on_arange(traced, 3, 3), expected)
