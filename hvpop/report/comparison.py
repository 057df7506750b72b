"""Two analyses side by side: which numbers differ by more than their errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import hypot, inf
from typing import Any

from .ranks import ranks

ROUNDING = 1e-6
"""Relative, what float32 may make of equal numbers; of a share, absolute."""


@dataclass(frozen=True)
class Row:
    """A number in both, with the half-width of its 95 % interval in each."""

    name: str
    a: float
    b: float
    error_a: float
    error_b: float

    @property
    def differs(self) -> bool:
        """Whether they are further apart than errors explain, rounding included."""
        rounding = ROUNDING * max(abs(self.a), abs(self.b))
        return abs(self.b - self.a) > hypot(self.error_a, self.error_b) + rounding

    @property
    def sigmas(self) -> float:
        """The difference in units of its error."""
        error = hypot(self.error_a, self.error_b)
        return inf if error == 0 and self.a != self.b else abs(self.b - self.a) / (error or 1.0)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as a table."""

    rows: tuple[Row, ...]
    settings: tuple[str, ...]  # what was not the same: data, parameters, versions
    missing: tuple[str, ...]  # numbers that only one of them has

    @property
    def differing(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.differs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rows": [asdict(row) | {"differs": row.differs} for row in self.rows],
            "settings": list(self.settings),
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        width = max([len("number"), *(len(row.name) for row in self.rows)])
        lines = [f"{'':<2}{'number':<{width}} {'a':>22} {'b':>22}"]
        for row in self.rows:
            a, b = (f"{x:.5g} +- {e:.1e}" for x, e in ((row.a, row.error_a), (row.b, row.error_b)))
            lines.append(f"{'* ' if row.differs else '  '}{row.name:<{width}} {a:>22} {b:>22}")
        count = len(self.differing)
        lines += [f"  only in one of them: {name}" for name in self.missing]
        lines += [f"  not the same: {what}" for what in self.settings]
        lines.append(
            f"{count} of {len(self.rows)} numbers differ by more than their errors"
            if count
            else f"none of {len(self.rows)} numbers differs by more than its error"
        )
        return "\n".join(lines)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Which numbers of two analyses (`Analysis.as_dict`) differ by more than their errors.

    An eigenvalue's error is its residual, with twice the error of the data where that is known; an
    estimate's the half-width of its 95 % interval. Eigenvalues are compared by their rank from the end
    of the spectrum that they were searched from, so that analyses may differ in ``k`` and ``which``.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.report import analyze, compare
    >>> d = torch.arange(1.0, 51.0).double()
    >>> one, two = (analyze(Diagonal(x), k=1, parts=["eigenvalues"]).as_dict() for x in (d, d + 1))
    >>> [row.name for row in compare(one, two).differing]
    ['eigenvalue 1', 'eigenvalue 1 from below']
    """
    for name, given in (("a", a), ("b", b)):
        if given.get("format") != 1:
            raise ValueError(
                f"{name} is no analysis of hvpop: its format is {given.get('format')!r}, not 1"
            )
    mine, other = dict(_numbers(a)), dict(_numbers(b))
    rows = tuple(
        Row(n, mine[n][0], other[n][0], mine[n][1], other[n][1]) for n in mine if n in other
    )
    missing = tuple(n for n in [*mine, *other] if (n in mine) != (n in other))
    settings = tuple(
        f"{key}: {left} and {right}" for key, left, right in _settings(a, b) if left != right
    )
    return Comparison(rows, settings, missing)


def _numbers(given: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    found = given.get("eigenvalues")
    if found:
        data = found["data_errors"] or [0.0] * len(found["residuals"])
        values = found["eigenvalues"]
        columns = ranks(values, given["which"]), values, found["residuals"], data
        for rank, value, residual, error in reversed(list(zip(*columns, strict=True))):
            yield f"eigenvalue {rank}", (value, residual + 2 * error)
    for key, name in (("trace", "trace"), ("norm", "Frobenius norm")):
        estimate = given.get(key)
        if estimate:
            half = (estimate["high"] - estimate["low"]) / 2
            yield name, (estimate["value"], hypot(half, 2 * (estimate["data_error"] or 0.0)))
    layers = given.get("layers")
    if layers:
        for i, layer in enumerate(layers["names"]):
            yield f"{layer}: trace", (layers["trace"][i], 2 * layers["trace_error"][i])
            yield f"{layer}: largest", (layers["largest"][i], layers["residual"][i])
            yield (
                f"{layer}: negative",
                (layers["negative"][i], 2 * layers["negative_error"][i] + ROUNDING),
            )


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in ("operator", "k", "which", "seed"):
        yield key, a.get(key), b.get(key)
    left, right = a.get("provenance", {}), b.get("provenance", {})
    for key in dict.fromkeys([*left, *right]):
        yield key, left.get(key), right.get(key)
