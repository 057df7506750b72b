"""Forms of batches: their standard error, what the algebra does to them, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.special import stdtrit
from torch import Tensor

from hvpop import BatchForms, Damped, Dense, Diagonal, Identity, LinearOperator

from .registry import F64, Averaged, averaged, dense, entries, symmetric

A, total = averaged(4)[0], averaged(4, normalized=False)[0]
S = symmetric(4)[0]
V = entries(4, 3)


def forms_of(operator: LinearOperator) -> BatchForms:
    forms = operator.batch_forms(V)
    assert forms is not None
    return forms


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_error_of_equal_batches_is_their_spread_over_the_root_of_their_number() -> None:
    values, ones = entries(7, 3), torch.ones(7, dtype=F64)
    spread = values.std(0)
    assert_close(BatchForms(values, ones, True).standard_error(), spread / 7**0.5)
    assert_close(BatchForms(values, 5 * ones, True).standard_error(), spread / 7**0.5)
    assert_close(BatchForms(values, ones, False).standard_error(), spread * 7**0.5)


@pytest.mark.parametrize(
    "sizes", [[10.0] * 6, [10.0] * 6 + [3.0], [4.0, 9.0, 14.0, 5.0, 8.0, 20.0]]
)
@pytest.mark.parametrize("normalized", [True, False])
def test_the_error_of_ragged_batches_covers_the_mean_of_the_population(
    sizes: list[float], normalized: bool
) -> None:
    """Batch means of normal samples, for 4000 data sets side by side."""
    weights, mean = torch.tensor(sizes, dtype=F64), 0.7
    values = mean + entries(len(sizes), 4000) / weights.sqrt()[:, None]
    forms = BatchForms(values, weights, normalized)
    truth = mean * (1.0 if normalized else float(weights.sum()))
    half = float(stdtrit(len(sizes) - 1, 0.975)) * forms.standard_error()
    covered = ((forms.average() - truth).abs() <= half).double().mean().item()
    assert 0.93 <= covered <= 0.97


def test_influences_cancel_and_their_squares_are_the_variance() -> None:
    forms = forms_of(A)
    assert_close(forms.influence().sum(0), torch.zeros(3, dtype=F64))
    assert_close(forms.influence().norm(dim=0), forms.standard_error())


def test_the_forms_are_those_of_the_batches() -> None:
    M, forms = A.matrices, forms_of(A)
    assert_close(forms.values, torch.stack([(V.T @ H @ V).diagonal() for H in M]))
    assert torch.equal(forms.weights, A.weights)
    two = A.batch_forms(V, batches=2)
    assert two is not None
    assert_close(two.values, forms.values[:2])
    assert repr(two) == "<forms of 3 columns over 2 batches>"


@pytest.mark.parametrize("operator", [A, total], ids=["mean", "sum"])
def test_a_multiple_has_the_error_times_its_size_and_exact_terms_add_none(
    operator: LinearOperator,
) -> None:
    error = forms_of(operator).standard_error()
    assert_close(forms_of(-3.0 * operator).standard_error(), 3 * error)
    for shifted in (
        Damped(operator, 0.5),
        operator + S,
        S - 2 * Identity(4) + operator,
        Damped(operator, 0.5) + Diagonal(V[:, 0]),
    ):
        forms = forms_of(shifted)
        assert_close(forms.average(), (V * (shifted @ V)).sum(0))
        assert_close(forms.standard_error(), error)


def test_the_damping_is_added_to_every_batch_of_a_mean_and_shared_out_over_a_sum() -> None:
    exact = 0.5 * V.square().sum(0)
    assert_close(forms_of(Damped(A, 0.5)).values, forms_of(A).values + exact)
    share = exact / total.weights.sum()
    assert_close(forms_of(Damped(total, 0.5)).values, forms_of(total).values + share)


@pytest.mark.parametrize(
    "operator", [S, A @ A, A**2, S @ A @ S, A @ A + S, S + S, 2 * S, Damped(S, 1.0)]
)
def test_what_is_no_average_over_data_has_no_forms(operator: LinearOperator) -> None:
    assert operator.batch_forms(V) is None


def test_an_array_gives_what_a_tensor_gives() -> None:
    from_array = A.batch_forms(V.numpy())
    assert from_array is not None
    assert_close(from_array.values, forms_of(A).values)
    of_list = A.batch_forms([[1], [0], [0], [0]])
    assert of_list is not None
    assert torch.equal(of_list.values[:, 0], A.matrices[:, 0, 0])


class Short(Averaged):
    """Forgets a column."""

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms:
        return super()._batch_forms(V[:, 1:], batches)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "two averages": (
        ValueError,
        "2 of its terms have data in them.*got .<4x4 Averaged float64 cpu>, <4x4 Scaled",
        lambda: (A + 2 * total).batch_forms(V),
    ),
    "an average and what is made of one": (
        ValueError,
        "2 of its terms have data in them",
        lambda: (A - S @ A @ S).batch_forms(V),
    ),
    "one batch": (
        ValueError,
        "at least two batches, got 1; split",
        lambda: BatchForms(entries(1, 2), entries(1), True).standard_error(),
    ),
    "no columns": (ValueError, r"k > 0, got \(4, 0\)", lambda: A.batch_forms(V[:, :0])),
    "a vector": (ValueError, r"expects shape \(4, k\), got \(4,\)", lambda: A.batch_forms(V[:, 0])),
    "float32": (TypeError, "expects dtype torch.float64", lambda: A.batch_forms(V.float())),
    "complex": (TypeError, "expects real numbers", lambda: A.batch_forms(1j * V.numpy())),
    "no batches": (ValueError, "batches > 0, got 0", lambda: A.batch_forms(V, batches=0)),
    "a rectangle": (
        ValueError,
        "expects a square operator, got <5x4 Dense",
        lambda: dense(5, 4)[0].batch_forms(V),
    ),
    "an operator that forgets a column": (
        ValueError,
        r"forms of its batches must have shape \(4, 3\), got \(4, 2\)",
        lambda: Short(A.matrices, A.weights).batch_forms(V),
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_in_words_that_help(mistake: str) -> None:
    error, words, do = REFUSED[mistake]
    with pytest.raises(error, match=words):
        do()


def test_an_operator_without_the_hook_counts_as_exact() -> None:
    assert_close(
        forms_of(A + Dense(A.matrix, symmetric=True)).standard_error(),
        forms_of(A).standard_error(),
    )
