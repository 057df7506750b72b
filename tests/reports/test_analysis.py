"""An analysis is what the functions give, and says what was not reached."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from hvpop import Dense, Diagonal, HessianOperator, layerwise
from hvpop.report import analyze, compare
from hvpop.report.provenance import provenance
from hvpop.report.ranks import ranks
from hvpop.spectrum import eigsh, frobenius_norm, spectral_density, trace

from .problems import analysis, operator


def test_every_part_is_what_its_function_gives() -> None:
    A, found = operator().linearize(), analysis()
    assert found.eigenvalues is not None
    pairs = eigsh(A, 4, "BE", seed=1, data_error=True)
    assert torch.equal(found.eigenvalues.eigenvalues, pairs.eigenvalues)
    assert torch.equal(found.eigenvalues.data_errors, pairs.data_errors)
    assert found.spectral_norm == pairs.eigenvalues.abs().max().item()
    assert found.trace == trace(A, seed=1, data_error=True)
    assert found.norm == frobenius_norm(A, seed=1)
    assert found.density is not None
    assert torch.equal(found.density.value, spectral_density(A, seed=1).value)
    assert found.layers is not None
    layers = layerwise(operator(), seed=1)
    assert torch.equal(found.layers.trace, layers.trace)
    assert torch.equal(found.layers.negative, layers.negative)
    assert found.check is not None
    assert found.check.healthy


def test_its_data_are_json_without_times_and_the_same_at_every_run() -> None:
    text = json.dumps(analysis().as_dict())
    assert text == json.dumps(analyze(operator(), k=2, seed=1).as_dict())
    assert "seconds" not in text
    assert json.loads(text)["products"]["eigenvalues"] > 0


def test_the_condition_is_told_of_a_positive_matrix_only() -> None:
    d = torch.linspace(1.0, 50.0, 60, dtype=torch.float64)
    positive = analyze(Diagonal(d), k=1, parts=["eigenvalues"])
    assert positive.condition == pytest.approx(50.0, rel=1e-12)
    assert analyze(Diagonal(d - 2), k=1, parts=["eigenvalues"]).condition is None
    assert analyze(Diagonal(d), k=1, which="LA", parts=["eigenvalues"]).condition is None


def test_what_an_operator_has_not_is_skipped_with_the_reason() -> None:
    found = analyze(Diagonal(torch.arange(1.0, 9.0).double()), k=1)
    assert set(found.skipped) == {"check", "layers"}
    assert found.check is found.layers is None
    assert found.findings == ()


def test_an_operator_that_is_not_symmetric_and_a_part_that_is_none_are_refused() -> None:
    with pytest.raises(ValueError, match="analyze expects a symmetric operator"):
        analyze(Dense(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="analyze expects parts in"):
        analyze(operator(), parts=["colour"])


def test_fingerprints_tell_parameters_and_data_apart() -> None:
    H = operator()
    before = analyze(H, parts=[]).provenance
    with torch.no_grad():
        H.risk.model[0].bias[0] += 1e-9
    after = analyze(H, parts=[]).provenance
    assert [key for key in before if before[key] != after[key]] == ["parameters"]


def test_eigenvalues_are_compared_by_rank_whatever_k_and_which_were() -> None:
    def found(k: int, which: Any) -> dict[str, Any]:
        return analyze(operator(), k=k, which=which, parts=["eigenvalues"]).as_dict()

    one = found(2, "LA")
    for other in (found(4, "LA"), found(3, "BE")):
        both = compare(one, other)
        assert [row.name for row in both.rows] == ["eigenvalue 1", "eigenvalue 2"]
        assert both.differing == ()
    ends = compare(found(2, "SA"), found(3, "BE"))
    assert [row.name for row in ends.rows] == ["eigenvalue 2 from below", "eigenvalue 1 from below"]
    assert ends.differing == ()
    assert compare(one, found(2, "SA")).rows == ()


def test_ranks_by_size_count_from_the_largest_or_from_zero() -> None:
    assert ranks([-3.0, 1.0, 2.0], "LM") == ["1 by size", "3 by size", "2 by size"]
    assert ranks([-3.0, 1.0, 2.0], "SM") == ["3 from zero", "1 from zero", "2 from zero"]


def test_equal_analyses_do_not_differ_and_another_point_does() -> None:
    one, H = analysis().as_dict(), operator()
    assert compare(one, analyze(operator(), k=2, seed=2).as_dict()).differing == ()
    with torch.no_grad():
        H.risk.model[2].weight.mul_(8.0)
    found = compare(one, analyze(H, k=2, seed=1, data_error=False).as_dict())
    assert "2: trace" in [row.name for row in found.differing]
    assert any(what.startswith("parameters: ") for what in found.settings)
    assert not any(what.startswith("data: ") for what in found.settings)
    with pytest.raises(ValueError, match="a is no analysis of hvpop"):
        compare({}, one)


def test_the_fingerprint_of_the_data_is_of_the_data_alone() -> None:
    model, data = nn.Linear(3, 2), [(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))]
    first, second = (
        provenance(HessianOperator(model, nn.CrossEntropyLoss(), data, seed=seed))
        for seed in (0, 1)
    )
    assert first == second
    other = [(x + 1, y) for x, y in data]
    assert provenance(HessianOperator(model, nn.CrossEntropyLoss(), other))["data"] != first["data"]
