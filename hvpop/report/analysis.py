"""What is to be known of an operator, computed by the functions of `hvpop.spectrum` one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..curvature import CheckResult, Cost
from ..operators import LinearOperator, arguments
from ..spectrum import (
    Density,
    Eigenpairs,
    Estimate,
    Layerwise,
    eigsh,
    frobenius_norm,
    layerwise,
    spectral_density,
    trace,
)
from ..spectrum.lanczos import Which
from .provenance import provenance

PARTS = ("check", "eigenvalues", "trace", "norm", "density", "layers")
"""What `analyze` can find out, in the order in which it does."""

T = TypeVar("T")


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found; parts that were not asked for or not reached are None."""

    operator: str
    parameters: int
    k: int
    which: str
    seed: int
    provenance: Mapping[str, str]  # versions, fingerprints of the parameters and the data
    check: CheckResult | None = None
    eigenvalues: Eigenpairs | None = None
    trace: Estimate | None = None
    norm: Estimate | None = None  # Frobenius
    density: Density | None = None
    layers: Layerwise | None = None
    cost: Cost | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # of each part
    products: Mapping[str, int] = field(default_factory=dict)
    kept: str = ""  # what the linearized operator kept and cost, in words
    interrupted: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)  # what this operator has not: why

    @property
    def condition(self) -> float | None:
        """The largest over the smallest eigenvalue, where all are positive and both ends are known."""
        found = self.eigenvalues
        if found is None or self.which != "BE" or found.status != "converged":
            return None
        if found.eigenvalues.shape[0] < min(2, self.parameters):
            return None
        low, high = found.eigenvalues[0].item(), found.eigenvalues[-1].item()
        certain = low - found.residuals[0].item() > 0
        return high / low if certain else None

    @property
    def spectral_norm(self) -> float | None:
        """The largest size of an eigenvalue, where the ends that have it are known."""
        found = self.eigenvalues
        if found is None or self.which not in ("BE", "LM") or found.eigenvalues.numel() == 0:
            return None
        return float(found.eigenvalues.abs().max())

    @property
    def findings(self) -> tuple[str, ...]:
        """What somebody should look at, in a line each; empty if all is as it should be."""
        found = []
        if self.check is not None and not self.check.healthy:
            found.append(self.check.verdict)
        for name in ("eigenvalues", "trace", "norm", "layers"):
            part = getattr(self, name)
            if part is not None and part.status != "converged":
                found.append(f"{name}: {part.status} after {part.products} products")
        if self.interrupted:
            found.append("interrupted: this is what there was")
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """All numbers as plain values for JSON, without times, so that equal runs give equal text."""
        parts = {
            name: _plain(getattr(self, name)) for name in PARTS if getattr(self, name) is not None
        }
        return {
            "format": 1,
            "operator": self.operator,
            "parameters": self.parameters,
            "k": self.k,
            "which": self.which,
            "seed": self.seed,
            **parts,
            "spectral_norm": self.spectral_norm,
            "condition": self.condition,
            "products": dict(self.products),
            "findings": list(self.findings),
            "skipped": dict(self.skipped),
            "provenance": dict(self.provenance),
        }


def analyze(
    H: LinearOperator,
    *,
    k: int = 5,
    which: Which = "BE",
    parts: Collection[str] = PARTS,
    data_error: bool = True,
    max_products: int | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Path | None = None,
    cost: Cost | None = None,
) -> Analysis:
    """Find out what there is to know of a symmetric operator, and keep it together.

    Parameters
    ----------
    H : LinearOperator
        Symmetric; best a `HessianOperator` or its like, which can be checked and has layers.
    k, which
        As for `hvpop.spectrum.eigsh`; ``"BE"`` with ``k`` pairs from both ends, ``2 k`` in all.
    parts
        Some of `PARTS`: the doctor's check, eigenvalues, trace, Frobenius norm, density, layers.
    data_error
        Whether to tell the error that comes of the data being a sample, where it is an average.
    max_products
        For each number; the functions' own budgets by default.
    seed, progress
        As for every function of `hvpop.spectrum`.
    checkpoint : Path, optional
        A folder that the parts keep their states in, and go on from.
    cost : Cost, optional
        Of `H.cost()`, to be shown beside what it came to.

    Returns
    -------
    Analysis
        After Ctrl-C what there was, `interrupted`.

    Notes
    -----
    Each number is that of the function of `hvpop.spectrum` of its name, called with this seed on
    ``H.linearize()``. Cost and memory: those of these functions.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.report import analyze
    >>> found = analyze(Diagonal(torch.arange(1.0, 51.0).double()), k=1, parts=["eigenvalues"])
    >>> [round(x) for x in found.eigenvalues.eigenvalues.tolist()], round(found.condition)
    ([1, 50], 50)
    """
    arguments.symmetric("analyze", H, "take A.T @ A")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"analyze expects parts in {PARTS}, got {', '.join(unknown)}")
    if checkpoint is not None:
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"analyze expects checkpoint to be a folder, or room for one, got {checkpoint}: "
                f"{error.strerror}"
            ) from error
    n = H.shape[0]
    state = Analysis(repr(H), n, k, which, seed, provenance(H), cost=cost)
    A = H.linearize()
    averages = data_error and H._averages_data() and (cost is None or cost.batches > 1)
    budget: dict[str, Any] = {} if max_products is None else {"max_products": max_products}
    common: dict[str, Any] = {"seed": seed, "progress": progress}

    def at(part: str) -> dict[str, Any]:
        return {**common, **budget, "checkpoint": checkpoint and checkpoint / f"{part}.pt"}

    pairs = min(n, 2 * k if which == "BE" else k)
    work: dict[str, Callable[[], Any]] = {
        "check": lambda: H.check(),
        "eigenvalues": lambda: eigsh(A, pairs, which, data_error=averages, **at("eigenvalues")),
        "trace": lambda: trace(A, data_error=averages, **at("trace")),
        "norm": lambda: frobenius_norm(A, **at("norm")),
        "density": lambda: spectral_density(A, **at("density")),
        "layers": lambda: layerwise(H, **common, **budget),
    }
    if averages and max_products is not None and max_products < 2:
        raise ValueError(f"analyze expects max_products >= 2, got {max_products}")
    lacking = _lacking(H)
    for part in PARTS:
        if part not in parts:
            continue
        if part in lacking:
            state = replace(state, skipped={**state.skipped, part: lacking[part]})
            continue
        start = time.perf_counter()
        try:
            found = work[part]()
        except KeyboardInterrupt:
            return replace(state, interrupted=True)
        seconds = {**state.seconds, part: time.perf_counter() - start}
        products = getattr(found, "products", None)
        counted = state.products if products is None else {**state.products, part: products}
        state = replace(state, **{part: found}, seconds=seconds, products=counted)
        if getattr(found, "status", None) == "interrupted":
            return replace(state, interrupted=True)
    return replace(state, kept=str(A.report()))


def _lacking(H: LinearOperator) -> dict[str, str]:
    found = {}
    if not hasattr(H, "check"):
        found["check"] = "only a matrix over data can be held against its gradients"
    if H.layout is None:
        found["layers"] = "no parameters with names"
    return found


def _plain(thing: Any) -> Any:
    """Tensors and dataclasses as lists and dicts; no vectors of n, and no times."""
    if is_dataclass(thing):
        hidden = ("eigenvectors", "history", "nodes", "weights", "timings")
        return {
            f.name: _plain(getattr(thing, f.name)) for f in fields(thing) if f.name not in hidden
        }
    if isinstance(thing, Tensor):
        return thing.detach().cpu().tolist()
    if isinstance(thing, tuple | list):
        return [_plain(part) for part in thing]
    return thing
