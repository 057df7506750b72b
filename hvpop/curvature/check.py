"""The doctor: whether a product is the derivative of the gradient, and what ails it if not."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..exchange import Entered
from ..strategies import FiniteDifference, ForwardOverReverse, HVPStrategy, ReverseOverReverse
from ..strategies.base import grad_enabled
from .examination import Examination, Examined, admitted
from .findings import CheckResult, Finding, Timing
from .memory import graph_bytes

__all__ = ["CheckResult", "check"]

FEW_DIGITS = 1e-2
"""Differences that are surer than this tell, though they tell less than they should."""

TINY = 1e-300
"""In place of zero as a divisor."""


def check(H: Examined, batches: int | None = 1) -> CheckResult:
    """Examine an operator on its first batches (None: on all). Raises nothing.

    See `HessianOperator.check`.
    """
    recording = Entered(warnings.catch_warnings(record=True))
    with recording, grad_enabled():
        warnings.simplefilter("always")
        try:
            examination = admitted(H, batches)
        except Exception as error:
            return CheckResult((Finding("wrong", "reading the model and data", _said(error)),), ())
        for what, step in _STEPS.items():
            try:
                step(examination)
            except Exception as error:
                examination.note("wrong", what, _said(error))
            if examination.failed:
                break  # what follows would only suffer from it
    for warning in recording.value:
        if issubclass(warning.category, UserWarning):  # others are for those who write the code
            examination.note("note", "a warning", str(warning.message))
    return CheckResult(tuple(examination.findings), tuple(examination.timings))


def _scan_modules(examination: Examination) -> None:
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


def _look_at_gradient(examination: Examination) -> None:
    """See whether losses and gradients are finite, what gets none, and whether hvpop sees all of it.

    The reference is a plain ``backward()`` on the model as its user has it.
    """
    reached: set[str] = set()
    for term in examination.terms:
        loss = term.function(examination.point, examination.state, *term.data)
        if not loss.isfinite():
            bad = [n for n, p in examination.point.items() if not p.isfinite().all()]
            where = f", and the parameters {_listed(bad)} are not finite" if bad else ""
            return examination.note("wrong", "loss", f"{loss.item()} in {term.label}{where}")
        plain = examination.plain_gradient(term)
        infinite = [n for n, g in plain.items() if not g.isfinite().all()]
        if infinite:
            what = f"not finite in {term.label} for {_listed(infinite)}"
            return examination.note("wrong", "gradient", what)
        reached |= set(plain)
        gap = examination.gradient_gap(term, plain)
        if gap > examination.rounding and examination.repeats(term, plain):
            examination.note(
                "wrong",
                "gradient",
                f"at exchanged parameters it differs by {gap:.1e} from a plain backward(): the model "
                "reaches its parameters in a way that no exchange of them can see",
            )
    unused = [name for name in examination.point if name not in reached]
    if unused:
        names = _listed(unused)
        examination.note("note", "parameters without gradient", f"{names}: zero rows and columns")


def _look_at_data(examination: Examination) -> None:
    """Multiply twice, reading the data each time."""
    v = examination.probe(0)
    again = admitted(examination.H, len(examination.terms))
    (first,) = examination.products(examination.strategy, v)
    if not first.isfinite().all():
        return examination.note("wrong", "product", f"not finite; {examination.culprit(v)}")
    (second,) = again.products(examination.strategy, v)
    gap = _gap(second, first)
    if gap <= examination.rounding:
        examination.note("ok", "determinism", f"two products differ by {gap:.1e}")
    else:
        examination.note(
            "wrong",
            "determinism",
            f"two products differ by {gap:.1e}: the data or the model is random "
            "in a way that seeds do not reach; pass list(data), or model.eval()",
        )


def _compare_products(examination: Examination) -> None:
    """Hold a product against its transpose, one in a block, differences, and other strategies."""
    u, v = examination.probe(1), examination.probe(2)
    uv = torch.cat([u, v], dim=1)
    Hu, Hv, H_uv = examination.products(examination.strategy, u, v, uv)
    gap = (u.double().T @ Hv.double() - v.double().T @ Hu.double()).abs()
    asymmetry = float(gap / (u.double().norm() * Hv.double().norm()).clamp_min(TINY))
    noise = 0.0
    if asymmetry > examination.rounding:
        noise = examination.noise(v)
    if asymmetry <= examination.rounding:
        examination.note("ok", "symmetry", f"u'Hv and v'Hu differ by {asymmetry:.1e}")
    elif noise > 0.1:
        examination.note("open", "symmetry", "tells nothing: the product is zero up to rounding")
    else:
        examination.note("wrong", "symmetry", f"u'Hv and v'Hu differ by {asymmetry:.1e}")
    apart = _gap(H_uv, torch.cat([Hu, Hv], dim=1))
    if not apart <= examination.rounding:
        what = f"columns together differ by {apart:.1e} from columns one by one"
        examination.note("wrong", "block products", what)
    truth, uncertainty = examination.difference(v)
    own = getattr(examination.strategy, "current", examination.strategy)
    plain = (ReverseOverReverse(), ForwardOverReverse(), FiniteDifference())
    known = (own.of(strategy) for strategy in plain)
    for strategy in {repr(s): s for s in (*known, own)}.values():
        _time(examination, strategy, v, truth)
    exact = [t for t in examination.timings if t.strategy != "FiniteDifference()"]
    best = min(exact, key=lambda t: t.error, default=None)
    right = [t.strategy for t in exact if t.error <= examination.tolerance]
    others = [name for name in right if name != repr(own)]
    _judge(examination, v, Hv, truth, uncertainty, others)
    for timing in exact:
        if best and timing.error > max(examination.tolerance, 10 * best.error):
            what = f"is off by {timing.error:.1e} where {best.strategy} is off by {best.error:.1e}"
            examination.note("note", timing.strategy, f"{what}: do not use it for this model")


def _judge(
    examination: Examination,
    v: Tensor,
    Hv: Tensor,
    truth: Tensor,
    uncertainty: float,
    others: list[str],
) -> None:
    """Say what the distance from finite differences means.

    It means little if these differ among themselves or if there is nothing but rounding, and much if
    ``others``, strategies, agree with them.
    """
    of_gradients = examination.strategy.of_gradients
    what = f"finite differences of {'gradients' if of_gradients else 'outputs'}"
    gap = _gap(Hv, truth)
    if gap <= examination.tolerance and truth.norm() > 0:
        examination.note("ok", what, f"differ by {gap:.1e}")
    elif not truth.norm() > 0 and not Hv.norm() > 0:
        examination.note("note", what, "are zero, as the product is: there is no curvature to see")
    elif examination.noise(v) > 0.1:
        examination.note("open", what, "tell nothing: the product is zero up to rounding")
    elif gap <= 10 * uncertainty and uncertainty <= FEW_DIGITS:
        examination.note("ok", what, f"differ by {gap:.1e}, among themselves by {uncertainty:.1e}")
    elif gap <= 10 * uncertainty:
        examination.note(
            "open",
            what,
            f"differ by {gap:.1e}, but by {uncertainty:.1e} among themselves, so they tell nothing: "
            "there are kinks near the point (relu, max, abs), or parts of the model keep few digits",
        )
    elif others:
        found = f"differ by {gap:.1e}, and agree with {others[0]}: use that"
        examination.note("wrong", what, found)
    else:
        examination.note(
            "wrong",
            what,
            f"differ by {gap:.1e}: a custom autograd.Function with a wrong second derivative, or a "
            "stop-gradient (detach, no_grad, straight-through, padding_idx)",
        )


def _time(examination: Examination, strategy: HVPStrategy, v: Tensor, truth: Tensor) -> None:
    term = examination.terms[0]
    try:
        (product,) = examination.products(strategy, v)  # also loads what torch loads on first use
        start = time.perf_counter()
        examination.products(strategy, v)
        seconds = time.perf_counter() - start
    except Exception as error:
        examination.note("note", repr(strategy), f"cannot be used: {_said(error)}")
        return
    size = None
    with suppress(Exception):  # function transforms cannot be looked into
        size = graph_bytes(
            lambda: strategy.linearize(
                term.function, examination.point, examination.state, *term.data
            ),
            examination.point.values(),
        )
    examination.timings.append(Timing(repr(strategy), seconds, size, _gap(product, truth)))


def _gap(x: Tensor, truth: Tensor) -> float:
    x, truth = x.double(), truth.double()  # squares of float32's small numbers are zero
    return float((x - truth).norm() / torch.maximum(x.norm(), truth.norm()).clamp_min(TINY))


def _hooks(module: nn.Module) -> list[object]:
    parametrized = getattr(module, "parametrizations", None)
    old = list(module._forward_pre_hooks.values())
    return old + [p for plist in (parametrized.values() if parametrized else ()) for p in plist]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


_STEPS: dict[str, Callable[[Examination], None]] = {
    "modules": _scan_modules,
    "loss and gradient": _look_at_gradient,
    "data": _look_at_data,
    "products": _compare_products,
}

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
