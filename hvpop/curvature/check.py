"""The doctor: whether a product is the derivative of the gradient, and what ails it if not."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..risk import EmpiricalRisk, Term
from ..strategies import (
    FiniteDifference,
    FirstThatWorks,
    ForwardOverReverse,
    HVPStrategy,
    Params,
    ReverseOverReverse,
)
from ..strategies.base import grad_enabled
from ..strategies.fallback import settled
from .diagnosis import culprit
from .findings import CheckResult, Finding, Level, Timing
from .memory import graph_bytes
from .referee import Difference, difference
from .space import WeightedSum, from_point, multiplier, to_point

if TYPE_CHECKING:
    from .hessian import HessianOperator

__all__ = ["CheckResult", "check"]


@dataclass
class _Examination:
    """The findings so far, and what they are made on."""

    H: HessianOperator
    risk: EmpiricalRisk  # in batch mode
    strategy: HVPStrategy
    terms: list[Term]
    point: Params
    state: Params
    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def note(self, level: Level, what: str, detail: str) -> None:
        if all(detail != finding.detail for finding in self.findings):
            self.findings.append(Finding(level, what, detail))

    @property
    def failed(self) -> bool:
        return any(finding.level == "wrong" for finding in self.findings)

    def product(self, strategy: HVPStrategy, v: Tensor) -> Tensor:
        columns = to_point(v.unsqueeze(1), self.H.layout, self.point)

        def compute() -> list[Tensor]:
            total = WeightedSum(self.risk.average.normalized)
            for term in self.terms:
                linear = strategy.linearize(term.function, self.point, self.state, *term.data)
                total.add(multiplier(columns)(linear), term.weight)
            return total.result()

        return from_point(settled(strategy, compute), v.unsqueeze(1))[:, 0]

    def difference(self, v: Tensor) -> Difference:
        columns = to_point(v.unsqueeze(1), self.H.layout, self.point)
        direction = {name: column[0] for name, column in columns.items()}
        return difference(self.risk, self.terms, self.point, self.state, direction)

    @property
    def tolerance(self) -> float:
        """Relative, for products against each other and against differences of gradients."""
        coarsest = max(torch.finfo(p.dtype).eps for p in self.point.values())
        return 1e-6 if coarsest < 1e-12 else 2e-2 if coarsest < 1e-6 else 1e-1

    @property
    def rounding(self) -> float:
        """Relative, for what differs by rounding alone."""
        if isinstance(getattr(self.strategy, "current", self.strategy), FiniteDifference):
            return self.tolerance
        coarsest = max(torch.finfo(p.dtype).eps for p in self.point.values())
        return min(1e4 * coarsest, 5e-2)


def check(H: HessianOperator, batches: int | None = 1) -> CheckResult:
    """Examine an operator on its first batches (None: on all). Raises nothing.

    See `HessianOperator.check`.
    """
    with warnings.catch_warnings(record=True) as warned, grad_enabled():
        warnings.simplefilter("always")
        try:
            examination = _admit(H, batches)
        except Exception as error:
            return CheckResult((Finding("wrong", "reading the model and data", _said(error)),), ())
        for step in (_scan_modules, _look_at_gradient, _look_at_data, _compare_products):
            try:
                step(examination)
            except Exception as error:
                examination.note("wrong", step.__name__.strip("_").replace("_", " "), _said(error))
            if examination.failed:
                break  # what follows would only suffer from it
    for warning in warned:
        examination.note("note", "a warning", str(warning.message))
    return CheckResult(tuple(examination.findings), tuple(examination.timings))


def _admit(H: HessianOperator, batches: int | None) -> _Examination:
    risk = H.risk.batchwise()
    point = {name: p.detach().clone() for name, p in risk.parameters().items()}
    state = {name: t.clone() for name, t in risk.state().items()}
    strategy = H.strategy
    if isinstance(
        strategy, FirstThatWorks
    ):  # whose steps down the chain are the operator's to take
        strategy = FirstThatWorks(*strategy.chain)
    with closing(risk.terms()) as terms:
        return _Examination(H, risk, strategy, list(islice(terms, batches)), point, state)


def _scan_modules(examination: _Examination) -> None:
    """Name what makes second derivatives hard, and what was done about it."""
    modules = list(examination.risk.model.named_modules())
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
    """See whether losses and gradients are finite, and which parameters get no gradient."""
    leaves = {n: p.clone().requires_grad_() for n, p in examination.point.items()}
    unused = set(leaves)
    for term in examination.terms:
        loss = term.function(leaves, examination.state, *term.data)
        if not loss.isfinite():
            return examination.note("wrong", "loss", f"{loss.item()} in {term.label}")
        gradient: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if loss.requires_grad:
            gradient = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        reached = {n: g for n, g in zip(leaves, gradient, strict=True) if g is not None}
        infinite = [n for n, g in reached.items() if not g.isfinite().all()]
        if infinite:
            what = f"not finite in {term.label} for {_listed(infinite)}"
            return examination.note("wrong", "gradient", what)
        unused -= set(reached)
    if unused:
        names = _listed([name for name in leaves if name in unused])
        examination.note("note", "parameters without gradient", f"{names}: zero rows and columns")


def _look_at_data(examination: _Examination) -> None:
    """Multiply twice, reading the data each time."""
    v = _probe(examination, 0)
    again = _admit(examination.H, len(examination.terms))
    first = examination.product(examination.strategy, v)
    if not first.isfinite().all():
        columns = to_point(v.unsqueeze(1), examination.H.layout, examination.point)
        place = examination.terms, examination.point, examination.state
        found = culprit(*place, examination.strategy, columns)
        return examination.note("wrong", "product", f"not finite; {found}")
    gap = _gap(first, again.product(examination.strategy, v))
    if gap <= examination.rounding:
        examination.note("ok", "determinism", f"two products differ by {gap:.1e}")
    else:
        examination.note(
            "wrong",
            "determinism",
            f"two products differ by {gap:.1e}: the data or the model is random "
            "in a way that seeds do not reach; pass list(data), or model.eval()",
        )


def _compare_products(examination: _Examination) -> None:
    """Hold every strategy against finite differences, and the operator's against its transpose."""
    u, v = _probe(examination, 1), _probe(examination, 2)
    Hv = examination.product(examination.strategy, v)
    Hu = examination.product(examination.strategy, u)
    asymmetry = float((u @ Hv - v @ Hu).abs() / (u.norm() * Hv.norm()).clamp_min(1e-30))
    level: Level = "ok" if asymmetry <= examination.rounding else "wrong"
    examination.note(level, "symmetry", f"u'Hv and v'Hu differ by {asymmetry:.1e}")
    truth = examination.difference(v)
    _judge(examination, _gap(Hv, truth.product), truth.error)
    own = getattr(examination.strategy, "current", examination.strategy)
    others = (ReverseOverReverse(), ForwardOverReverse(), FiniteDifference())
    for strategy in {repr(s): s for s in (*others, own)}.values():
        _time(examination, strategy, v, truth.product)
    errors = {
        t.strategy: t.error for t in examination.timings if t.strategy != "FiniteDifference()"
    }
    for name, error in errors.items():
        if error > max(examination.tolerance, 10 * min(errors.values())):
            examination.note(
                "note",
                name,
                f"is off by {error:.1e} where another strategy is off by {min(errors.values()):.1e}: "
                "do not use it for this model",
            )


def _judge(examination: _Examination, gap: float, uncertainty: float) -> None:
    """Say what the distance from finite differences means, given how far those can be trusted."""
    what = "finite differences of gradients"
    if gap <= examination.tolerance:
        examination.note("ok", what, f"differ by {gap:.1e}")
    elif gap <= 10 * uncertainty:
        examination.note(
            "note",
            what,
            f"differ by {gap:.1e}, but by {uncertainty:.1e} among themselves, so they tell nothing: "
            "there are kinks near the point (relu, max, abs), or too few digits; try model.double()",
        )
    else:
        examination.note(
            "wrong",
            what,
            f"differ by {gap:.1e}: a custom autograd.Function with a wrong second derivative, or a "
            "stop-gradient (detach, no_grad, straight-through, padding_idx)",
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
