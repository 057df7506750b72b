"""The doctor: whether a product is the derivative of the gradient, and what ails it if not."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..risk import Term
from ..strategies import (
    FiniteDifference,
    ForwardOverReverse,
    HVPStrategy,
    Params,
    ReverseOverReverse,
)
from ..strategies.base import grad_enabled
from .memory import graph_bytes
from .space import WeightedSum, from_point, multiplier, to_point

if TYPE_CHECKING:
    from .hessian import HessianOperator

Level = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    detail: str


@dataclass(frozen=True)
class Timing:
    """What one product costs with one strategy."""

    strategy: str
    seconds: float
    graph_bytes: int
    error: float  # relative, against finite differences of backward() gradients


@dataclass(frozen=True)
class CheckResult:
    """What `HessianOperator.check` found; prints as a report."""

    findings: tuple[Finding, ...]
    timings: tuple[Timing, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; notes do not count."""
        return all(finding.level != "wrong" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line."""
        wrong = [finding.what for finding in self.findings if finding.level == "wrong"]
        if wrong:
            return "do not trust this operator yet: " + ", ".join(wrong)
        notes = sum(finding.level == "note" for finding in self.findings)
        return "healthy" + (f", {notes} notes" if notes > 1 else ", one note" if notes else "")

    def __str__(self) -> str:
        signs = {"ok": "  ok  ", "note": " note ", "wrong": "WRONG "}
        lines = [f"{signs[f.level]} {f.what}: {f.detail}" for f in self.findings]
        lines += [
            f"       {t.strategy}: {t.seconds * 1e3:.3g} ms a product, "
            f"{t.graph_bytes / 2**20:.2f} MiB of graph, error {t.error:.1e}"
            for t in self.timings
        ]
        return "\n".join([*lines, f"verdict: {self.verdict}"])


@dataclass
class _Examination:
    """The findings so far, and what they are made on."""

    H: HessianOperator
    terms: list[Term]
    point: Params
    state: Params
    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def note(self, level: Level, what: str, detail: str) -> None:
        self.findings.append(Finding(level, what, detail))

    def product(self, strategy: HVPStrategy, v: Tensor) -> Tensor:
        columns = to_point(v.unsqueeze(1), self.H.layout, self.point)
        total = WeightedSum(self.H.risk.average.normalized)
        with grad_enabled():
            for term in self.terms:
                linear = strategy.linearize(term.function, self.point, self.state, *term.data)
                total.add(multiplier(columns)(linear), term.weight)
        return from_point(total.result(), v.unsqueeze(1))[:, 0]

    def difference(self, v: Tensor) -> Tensor:
        """Fourth-order central difference of plain ``backward()`` gradients."""
        direction = to_point(v.unsqueeze(1), self.H.layout, self.point)
        length = float(v.norm())
        size = sum(float(p.double().norm()) ** 2 for p in self.point.values()) ** 0.5
        h = torch.finfo(v.dtype).eps ** 0.2 * max(size, 1.0) / length / 4
        total = WeightedSum(self.H.risk.average.normalized)
        for term in self.terms:
            sums = WeightedSum(normalized=False)
            for shift, coefficient in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
                moved = {n: p + shift * h * direction[n][0] for n, p in self.point.items()}
                with grad_enabled():
                    gradient = self.H.risk.gradient(moved, self.state, *term.data)
                sums.add(list(gradient.values()), coefficient / (12 * h))
            total.add(sums.result(), term.weight)
        return from_point(total.result(), v.unsqueeze(1))[:, 0]


def check(H: HessianOperator, batches: int | None = 1) -> CheckResult:
    """Examine an operator on its first batches (None: on all). Raises nothing.

    See `HessianOperator.check`.
    """
    try:
        examination = _admit(H, batches)
    except Exception as error:
        return CheckResult((Finding("wrong", "reading the model and data", _said(error)),), ())
    for step in (_scan_modules, _look_at_gradient, _look_at_data, _compare_products):
        try:
            step(examination)
        except Exception as error:
            examination.note("wrong", step.__name__.strip("_").replace("_", " "), _said(error))
    return CheckResult(tuple(examination.findings), tuple(examination.timings))


def _admit(H: HessianOperator, batches: int | None) -> _Examination:
    point = {name: p.detach().clone() for name, p in H.risk.parameters().items()}
    state = {name: t.clone() for name, t in H.risk.state().items()}
    with closing(H.risk.batchwise().terms()) as terms:
        return _Examination(H, list(islice(terms, batches)), point, state)


def _scan_modules(examination: _Examination) -> None:
    """Name what makes second derivatives hard, and what was done about it."""
    modules = list(examination.H.risk.model.named_modules())
    for kinds, words in _REMARKABLE:
        found = [
            name or type(m).__name__ for name, m in modules if isinstance(m, kinds) and m.training
        ]
        if found:
            examination.note("note", f"train mode in {_listed(found)}", words)
    hooked = [
        name
        for name, m in modules
        if any(type(h).__name__ in ("WeightNorm", "_WeightNorm") for h in _hooks(m))
    ]
    if hooked:
        examination.note("note", f"weight_norm on {_listed(hooked)}", "rewritten: torch's is wrong")
    checkpointed = [
        n or type(m).__name__ for n, m in modules if getattr(m, "gradient_checkpointing", False)
    ]
    if checkpointed:
        examination.note(
            "note",
            f"checkpoints in {_listed(checkpointed)}",
            "run as plain calls, which keep their graphs",
        )


def _look_at_gradient(examination: _Examination) -> None:
    """See whether loss and gradient are finite, and which parameters get none."""
    term = examination.terms[0]
    leaves = {n: p.clone().requires_grad_() for n, p in examination.point.items()}
    with grad_enabled():
        loss = term.function(leaves, examination.state, *term.data)
        gradient = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    if not loss.isfinite():
        examination.note("wrong", "loss", f"{loss.item()} in {term.label}")
    unused = [name for name, g in zip(leaves, gradient, strict=True) if g is None]
    if unused:
        examination.note(
            "note", "parameters without gradient", f"{_listed(unused)}: zero rows and columns"
        )
    infinite = [
        n for n, g in zip(leaves, gradient, strict=True) if g is not None and not g.isfinite().all()
    ]
    if infinite:
        examination.note("wrong", "gradient", f"not finite for {_listed(infinite)}")


def _look_at_data(examination: _Examination) -> None:
    """Multiply twice, reading the data each time."""
    v = _probe(examination, 0)
    again = _admit(examination.H, len(examination.terms))
    first = examination.product(examination.H.strategy, v)
    gap = _gap(first, again.product(examination.H.strategy, v))
    if gap > 100 * torch.finfo(v.dtype).eps:
        examination.note(
            "wrong",
            "determinism",
            f"two products differ by {gap:.1e}: the data or the model is random "
            "in a way that seeds do not reach; pass list(data), or model.eval()",
        )
    else:
        examination.note("ok", "determinism", f"two products differ by {gap:.1e}")


def _compare_products(examination: _Examination) -> None:
    """Hold every strategy against finite differences, and the operator's against its transpose."""
    u, v = _probe(examination, 1), _probe(examination, 2)
    Hv = examination.product(examination.H.strategy, v)
    Hu = examination.product(examination.H.strategy, u)
    asymmetry = float((u @ Hv - v @ Hu).abs() / (u.norm() * Hv.norm()).clamp_min(1e-30))
    level: Level = "ok" if asymmetry < 1e4 * torch.finfo(v.dtype).eps else "wrong"
    examination.note(level, "symmetry", f"u'Hv and v'Hu differ by {asymmetry:.1e}")
    truth = examination.difference(v)
    tolerance = 1e-6 if v.dtype == torch.float64 else 2e-2
    gap = _gap(Hv, truth)
    if gap < tolerance:
        examination.note("ok", "finite differences of gradients", f"differ by {gap:.1e}")
    else:
        examination.note(
            "wrong",
            "finite differences of gradients",
            f"differ by {gap:.1e}: a custom autograd.Function with a wrong second derivative, a "
            "stop-gradient (detach, no_grad, straight-through, padding_idx), or a kink near the point",
        )
    for strategy in (ReverseOverReverse(), ForwardOverReverse(), FiniteDifference()):
        _time(examination, strategy, v, truth)
    errors = {t.strategy: t.error for t in examination.timings}
    forward, reverse = errors.get("ForwardOverReverse()"), errors.get("ReverseOverReverse()")
    if forward is not None and reverse is not None and forward > max(tolerance, 10 * reverse):
        examination.note(
            "note",
            "ForwardOverReverse",
            f"is off by {forward:.1e} where ReverseOverReverse is off by "
            f"{reverse:.1e}: do not use it for this model",
        )


def _time(examination: _Examination, strategy: HVPStrategy, v: Tensor, truth: Tensor) -> None:
    try:
        term = examination.terms[0]
        product = examination.product(strategy, v)  # also loads what torch loads on first use
        start = time.perf_counter()
        examination.product(strategy, v)
        seconds = time.perf_counter() - start
        build: Callable[[], object] = lambda: strategy.linearize(  # noqa: E731
            term.function, examination.point, examination.state, *term.data
        )
        with grad_enabled():
            size = graph_bytes(build, examination.point.values())
    except Exception as error:
        examination.note("note", repr(strategy), f"cannot be used: {_said(error)}")
        return
    examination.timings.append(Timing(repr(strategy), seconds, size, _gap(product, truth)))


def _probe(examination: _Examination, seed: int) -> Tensor:
    H = examination.H
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(H.shape[1], generator=generator, dtype=torch.float64)
    return v.to(H.device, torch.float64 if H.torch_dtype == torch.float64 else torch.float32)


def _gap(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm().clamp_min(1e-30))


def _hooks(module: nn.Module) -> list[object]:
    parametrized = getattr(module, "parametrizations", None)
    old = list(module._forward_pre_hooks.values())
    return old + [p for plist in (parametrized.values() if parametrized else ()) for p in plist]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


_REMARKABLE: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (
        (nn.modules.dropout._DropoutNd,),
        "one mask per batch, fixed by the operator's seed; model.eval() removes it",
    ),
    (
        (nn.modules.batchnorm._BatchNorm,),
        "batch statistics couple the samples; running ones are left alone; model.eval() uses them",
    ),
)
