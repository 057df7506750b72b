"""Every model of the zoo has the Hessian that its gradients say, and is left as it was."""

from __future__ import annotations

import importlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import TOTAL, HessianOperator
from hvpop.risk import SAMPLES, EmpiricalRisk, hugging_face

from .reference import count, double_backward, finite_difference
from .registry import CASES, Case, Problem
from .untouched import leave_gradients, same, seen_of_the_user

for _path in sorted(Path(__file__).parent.glob("cases_*.py")):
    try:
        importlib.import_module(f".{_path.stem}", __package__)
    except pytest.skip.Exception:  # the optional packages of a family are not here
        continue

ANSWERED = [case for case in CASES.values() if case.refused is None]
REFUSED = [case for case in CASES.values() if case.refused is not None]
COMPARED = [case for case in ANSWERED if case.reference != "laws"]
COEFFICIENTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
ADVICE = (
    "batches are run one by one"  # a warning about speed, that any model may get
    "|Sparse invariant checks are implicitly disabled"  # torch 2.11's own, of any sparse tensor
)
TRUSTED = 1e-8  # what two step sizes of the reference may differ by


@dataclass(frozen=True)
class Outcome:
    """What one case gave: its products, what was seen before and after, and the warnings."""

    case: Case
    problem: Problem
    V: Tensor  # (n, 3)
    live_vector: Tensor  # H V[:, 0], (n,)
    live_block: Tensor  # H V, (n, 3)
    linearized_vector: Tensor
    linearized_block: Tensor
    combination: Tensor  # H (V c), c the coefficients, (n,)
    before: dict[str, Any]
    after: dict[str, Any]
    warned: list[str]


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """Return the outcome of the case, found once for all that is claimed about it."""
    return observe(request.param)


def each(cases: list[Case]) -> pytest.MarkDecorator:
    names = [f"{case.family}-{case.name}" for case in cases]
    return pytest.mark.parametrize("outcome", cases, ids=names, indirect=True, scope="module")


@each(COMPARED)
def test_a_product_is_the_derivative_of_the_gradient(outcome: Outcome) -> None:
    expected = reference(outcome.case, outcome.V)
    assert error(outcome.live_block, expected) < outcome.case.tolerance


@each(ANSWERED)
def test_live_and_linearized_vector_and_block_agree(outcome: Outcome) -> None:
    vector, block = outcome.live_vector, outcome.live_block
    assert error(vector, block[:, 0]) < outcome.case.agreement
    assert error(outcome.linearized_vector, vector) < outcome.case.agreement
    assert error(outcome.linearized_block, block) < outcome.case.agreement


@each(ANSWERED)
def test_the_operator_is_linear_and_symmetric(outcome: Outcome) -> None:
    assert error(outcome.combination, outcome.live_block @ COEFFICIENTS) < outcome.case.agreement
    if not outcome.case.symmetric:
        return
    gram = outcome.V.T @ outcome.live_block
    scale = outcome.V.norm() * outcome.live_block.norm() + 1e-12
    assert ((gram - gram.T).norm() / scale).item() < outcome.case.agreement


@each(ANSWERED)
def test_nothing_of_the_users_changes(outcome: Outcome) -> None:
    assert outcome.before.keys() == outcome.after.keys()
    changed = [k for k, seen in outcome.before.items() if not same(seen, outcome.after[k])]
    assert changed == []


@each(ANSWERED)
def test_only_documented_warnings_are_given(outcome: Outcome) -> None:
    pattern = outcome.case.warns
    if pattern is not None:
        assert any(re.search(pattern, message) for message in outcome.warned)
    allowed = ADVICE if pattern is None else f"{ADVICE}|{pattern}"
    assert [m for m in outcome.warned if not re.search(allowed, m)] == []


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.family}-{case.name}")
def test_what_cannot_be_done_is_refused_with_the_reason(case: Case) -> None:
    problem = built(case)
    leave_gradients(problem)
    before = seen_of_the_user(problem)
    assert case.refused is not None
    v = torch.ones(count(problem), dtype=torch.float64)
    with pytest.raises(Exception, match=case.refused):
        operator(case, problem).matvec(v)
    after = seen_of_the_user(problem)
    assert [k for k, seen in before.items() if not same(seen, after[k])] == []


def test_the_zoo_is_large() -> None:
    assert len(CASES) >= 190


def test_the_reference_knows_a_quartic() -> None:
    """``mean((a w)^4)`` has the Hessian ``12 mean(a a' (a w)^2)``; order four is exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, v = torch.randn(7, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    data = [(rows[:5], rows[:5]), (rows[5:], rows[5:])]
    found = finite_difference(Problem(model, data, lambda out, _: (out**4).mean()), v)
    squares = (rows @ model.weight.detach()[0]).square()
    expected = 12 * rows.T @ (squares * (rows @ v)) / 7
    assert error(found.product, expected) < 1e-10
    assert found.error < 1e-9


def test_the_reference_tells_a_kink() -> None:
    class Kink(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1e-5], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.w * x)

    one = torch.ones(1, 1, dtype=torch.float64)
    problem = Problem(Kink(), [(one, one)], nn.MSELoss())
    assert finite_difference(problem, one[0]).error > 1e-2


# -- how a case is run ----------------------------------------------------------------------------


def observe(case: Case) -> Outcome:
    """Build the problem and let the library loose on it, as its user would."""
    problem = built(case)
    leave_gradients(problem)
    V = directions(problem)
    mixed = V @ COEFFICIENTS.to(V.dtype)
    before = seen_of_the_user(problem)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with case.caller():
            H = operator(case, problem)
            live_vector, live_block = H @ V[:, 0], H @ V
            A = H.linearize()
            linearized_vector, linearized_block = A @ V[:, 0], A @ V
            combination = H @ mixed
    after = seen_of_the_user(problem)
    products = [live_vector, live_block, linearized_vector, linearized_block, combination]
    assert all(p.dtype == torch.result_type(p, p) and not p.requires_grad for p in products)
    return Outcome(
        case,
        problem,
        V.double(),
        *(p.double().clone() for p in products),
        before=before,
        after=after,
        warned=[str(warning.message) for warning in record],
    )


def built(case: Case) -> Problem:
    """Return the case's problem, always the same one, made in float64."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a user's own code warns about
        torch.manual_seed(case.seed)
        torch.set_default_dtype(torch.float64)
        try:
            return case.build()
        finally:
            torch.set_default_dtype(default)


def operator(case: Case, problem: Problem) -> HessianOperator:
    """Return the Hessian as the documentation says to make it."""
    average = TOTAL if case.total else SAMPLES
    if problem.hugging_face or problem.batch_loss is not None:
        batch_loss = hugging_face() if problem.hugging_face else problem.batch_loss
        risk = EmpiricalRisk.from_batch_loss(
            problem.model, batch_loss, problem.data, average=average
        )
        return HessianOperator.from_risk(risk)
    return HessianOperator(problem.model, problem.loss, problem.data, average=average)


def directions(problem: Problem) -> Tensor:
    """Return three columns (n, 3) of the precision that the model's products have."""
    generator = torch.Generator().manual_seed(1)
    V = torch.randn(count(problem), 3, dtype=torch.float64, generator=generator)
    dtypes = {p.dtype for p in problem.parameters()}
    return V if dtypes & {torch.float64, torch.complex128} else V.float()


def reference(case: Case, V: Tensor) -> Tensor:
    """Return ``H V`` (n, 3) by the case's reference, on a problem of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = built(case)
        columns = V.unbind(1)
        if problem.expected is not None:
            return torch.stack([problem.expected(v) for v in columns], dim=1).double()
        if case.reference == "double backward":
            rows = [double_backward(problem, v, total=case.total) for v in columns]
            return torch.stack(rows, dim=1)
        found = [finite_difference(problem, v, total=case.total) for v in columns]
    assert max(f.error for f in found) < TRUSTED, "the reference of this case is not smooth enough"
    expected = torch.stack([f.product for f in found], dim=1)
    assert expected.norm() > 1e-4, "this case has no curvature to be wrong about"
    return expected


def error(found: Tensor, expected: Tensor) -> float:
    """Return the difference relative to what is expected, or as it is if that is zero."""
    assert found.shape == expected.shape
    scale = expected.norm().item()
    difference = (found - expected).norm().item()
    return difference / scale if scale > 0 else difference
