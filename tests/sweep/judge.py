"""A verdict on each way to multiply, by fourth-order differences of `backward()` gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hvpop import BATCHES, Compiled, ForwardOverReverse, HessianOperator
from hvpop.risk.rewrites import Rewrites
from hvpop.strategies import NoSecondDerivativeError

from .problems import Problem, parameters_of

STEPS = [2e-2 * 4.0**-k for k in range(7)]
DATA = [(torch.ones(1, dtype=torch.float64), torch.zeros(1))]
TELLING = 1e-4
"""Differences whose two best steps agree no better tell nothing."""

TOLD = 1e-4
"""The finite differences that hvpop falls back to are less exact than those they are held against."""

LIKE = 1e-7
"""A formula's gradient is torch's but for rounding; torch has 1/6 in float32 for hardsigmoid."""

Values = Callable[[float], Tensor]  # step along v -> gradient, or loss


@dataclass
class Verdict:
    """What became of one sample."""

    name: str
    variant: str
    sample: int
    verdict: str  # right, differences, refused, wrong, kink, unknown, first gradient, no gradient
    rewritten: list[str] = field(default_factory=list)
    detail: str = ""
    ways: dict[str, str] = field(default_factory=dict)  # way to multiply -> right or what it was

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judged(problem: Problem, *, trace: bool) -> Verdict:
    verdict = Verdict(problem.name, problem.variant, problem.sample, "right")
    params = parameters_of(problem)
    if not params:
        verdict.verdict, verdict.detail = "no gradient", "no differentiable input"
        return verdict
    n = sum(p.numel() for p in params)
    v = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = v / v.abs().max()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = _gradient(problem, params)
            truth, doubt = _difference(lambda s: _gradient(problem, params, s * v))
            verdict.rewritten, unlike = _rewritten(problem, params, base)
    except Exception as error:
        verdict.verdict, verdict.detail = "no gradient", _first_line(error)
        return verdict
    if not base.isfinite().all():
        verdict.verdict, verdict.detail = "no gradient", "it is not finite"
        return verdict
    told = doubt < TELLING
    _products(problem, verdict, v, truth, max(1e-6, 10 * doubt) if told else 1e-6, trace=trace)
    if unlike > LIKE:
        verdict.verdict = "wrong"
        verdict.detail = f"the gradient of the formula is {unlike:.0e} off; {verdict.detail}"
    if verdict.verdict in ("wrong", "refused") or "wrong" in " ".join(verdict.ways.values()):
        _excuse(problem, verdict, params, base, v, truth, doubt)
    return verdict


def _products(
    problem: Problem, verdict: Verdict, v: Tensor, truth: Tensor, tolerance: float, *, trace: bool
) -> None:
    def operator(**options: Any) -> HessianOperator:
        return HessianOperator(problem.module, _itself, DATA, average=BATCHES, **options)

    W = torch.randn(len(v), 2, dtype=v.dtype, generator=torch.Generator().manual_seed(2))
    ways: dict[str, Callable[[], Tensor]] = {
        "live": lambda: operator() @ v,
        "linearized": lambda: operator().linearize() @ v,
        "columns": lambda: (operator().linearize() @ torch.column_stack((W, v)))[:, 2],
        "forward": lambda: operator(strategy=ForwardOverReverse()) @ v,
    }
    if trace:
        ways["compiled"] = lambda: operator(strategy=Compiled(compiler=False)).linearize() @ v
    for way, product in ways.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                error = _off(product(), truth)
                said = " ".join(str(w.message) for w in told)
                found = "right" if error <= tolerance else f"wrong by {error:.0e}"
                if "using FiniteDifference" in said:
                    found = f"differences: {said.partition(';')[0]}" if error <= TOLD else found
                elif way == "forward" and "differ by" in said:
                    found = f"told: {found}"
            except Exception as error:
                found = f"refused: {type(error).__name__}: {_first_line(error)}"
                if way == "compiled" and isinstance(error, NoSecondDerivativeError):
                    found = "no second derivative"  # asked for by name, so it does not step down
        verdict.ways[way] = found
    exact = {way: found for way, found in verdict.ways.items() if way != "forward"}
    for kind in ("wrong", "refused", "differences"):
        bad = {way: found for way, found in exact.items() if found.startswith(kind)}
        if bad:
            verdict.verdict = kind
            way, found = next(iter(bad.items()))
            verdict.detail = f"{', '.join(bad)}: {found.removeprefix(kind).lstrip(': ')}"
            return
    if verdict.ways["forward"].startswith("wrong"):
        verdict.verdict, verdict.detail = "wrong", f"forward {verdict.ways['forward']}"


def _excuse(
    problem: Problem,
    verdict: Verdict,
    params: Sequence[Tensor],
    base: Tensor,
    v: Tensor,
    truth: Tensor,
    doubt: float,
) -> None:
    """Where differences tell nothing: at kinks, at steps, and where the first gradient is wrong."""
    if not doubt < TELLING:
        verdict.verdict = f"unknown ({verdict.verdict})"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = 1e-4
        sides = []
        for s in (h, -h):
            near, far = (_gradient(problem, params, k * s * v) for k in (1, 2))
            sides.append((4 * near - far - 3 * base) / (2 * s))
        if not _off(sides[0], sides[1]) < 1e-2:
            verdict.verdict = f"kink ({verdict.verdict})"
            return
        slope, unsure = _difference(lambda s: _loss(problem, params, s * v).detach().reshape(1))
    off = float((slope - base @ v).abs()) / (float(base.norm() * v.norm()) + 1e-300)
    if off > max(1e-6, 10 * unsure):
        verdict.detail = (
            f"{verdict.verdict}: {verdict.detail}; the gradient itself is {off:.0e} off"
        )
        verdict.verdict = "first gradient"


def _rewritten(problem: Problem, params: Sequence[Tensor], base: Tensor) -> tuple[list[str], float]:
    """The ops that formulas stand in for, and how far the gradient of these is from torch's."""
    seen: set[str] = set()
    with Rewrites(seen):
        loss = problem.module(DATA[0][0])
    if not seen:
        return [], 0.0
    gradient = _flat(torch.autograd.grad(loss, list(params), allow_unused=True), params)
    return sorted(seen), _off(gradient, base)


def _difference(values: Values) -> tuple[Tensor, float]:
    """The best of differences of several steps, and by how much it differs from the next."""
    found = [
        (8 * (values(h) - values(-h)) - (values(2 * h) - values(-2 * h))) / (12 * h) for h in STEPS
    ]
    doubts = [_off(a, b) for a, b in pairwise(found)]
    best = min(range(len(doubts)), key=lambda k: doubts[k] if doubts[k] == doubts[k] else 1e300)
    return found[best + 1], doubts[best]


def _loss(problem: Problem, params: Sequence[Tensor], step: Tensor | None = None) -> Tensor:
    if step is None:
        return problem.module(DATA[0][0])
    before = [p.detach().clone() for p in params]
    parts = step.split([p.numel() for p in params])
    with torch.no_grad():
        for p, part in zip(params, parts, strict=True):
            p += part.reshape(p.shape)
    try:
        return problem.module(DATA[0][0])
    finally:
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.data = old


def _gradient(problem: Problem, params: Sequence[Tensor], step: Tensor | None = None) -> Tensor:
    for p in params:
        p.grad = None
    before = [p.detach().clone() for p in params]
    if step is not None:
        with torch.no_grad():
            for p, part in zip(params, step.split([p.numel() for p in params]), strict=True):
                p += part.reshape(p.shape)
    try:
        problem.module(DATA[0][0]).backward()
        return _flat([p.grad for p in params], params)
    finally:
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
                p.grad = None


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    parts = []
    for t, p in zip(tensors, like, strict=True):
        t = torch.zeros_like(p) if t is None else t.to_dense() if t.layout != p.layout else t
        parts.append(t.detach().reshape(-1))
    return torch.cat(parts).clone()


def _off(a: Tensor, b: Tensor) -> float:
    scale = max(float(b.norm()), 1e-6)  # below that differences are rounding
    error = float((a - b).norm()) / scale
    return error if error == error else float("inf")


def _itself(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:240]
