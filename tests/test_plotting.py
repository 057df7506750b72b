"""Pictures: each takes a result, returns Axes, and says on it what it shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from hvpop import Damped, Dense, Diagonal, Layout
from hvpop.plotting import plot_convergence, plot_density, plot_eigenvalues, plot_eigenvector
from hvpop.solvers import cg, lsmr, matrix_function, multishift_cg, steihaug
from hvpop.spectrum import diagonal, eigsh, logdet, spectral_density, trace

F64 = torch.float64
A = Diagonal(torch.cat([torch.linspace(-1, 1, 50), torch.tensor([3.0, 5.0])]).to(F64))
P = Damped(A, 2.0)  # positive definite
B = torch.ones(52, dtype=F64)
LAYOUT = Layout(("weight", "bias"), (torch.Size([5, 10]), torch.Size([2])))


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def texts(ax: Axes) -> str:
    legend = ax.get_legend()
    entries = [] if legend is None else [text.get_text() for text in legend.get_texts()]
    return "\n".join([ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *entries])


def words_in(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def drawn(ax: Axes) -> None:
    ax.figure.canvas.draw()  # a layout that does not fit warns, and a warning is an error


def test_a_density_shows_its_band_and_the_eigenvalues() -> None:
    density, top = spectral_density(A), eigsh(A, 2)
    ax = plot_density(density, top)
    drawn(ax)
    assert ax.get_yscale() == "log"
    for words in ("Density of 52 eigenvalues", "95 % confidence band", "2 eigenvalues found"):
        assert words in texts(ax)
    curve, _, marks = ax.get_lines()
    assert list(marks.get_xdata()) == pytest.approx([3.0, 5.0])
    shown = torch.tensor(curve.get_ydata(), dtype=F64)
    visible = density.value > 2 * ax.get_ylim()[0]
    torch.testing.assert_close(shown[visible], density.value[visible])


def test_eigenvalues_are_drawn_largest_first_with_their_signs() -> None:
    found = eigsh(A, 6, "BE")
    ax = plot_eigenvalues(found)
    drawn(ax)
    heights = [y for container in ax.containers for y in container[0].get_ydata()]
    assert heights == pytest.approx(found.eigenvalues.flip(0).tolist())
    for words in ("positive", "negative", "converged", "largest residual"):
        assert words in texts(ax)


def test_positive_eigenvalues_over_decades_get_a_log_scale() -> None:
    found = eigsh(Diagonal(torch.logspace(-3, 0, 8, dtype=F64)), 8)
    assert plot_eigenvalues(found).get_yscale() == "log"


def test_no_eigenpairs_are_drawn_as_words() -> None:
    ax = plot_eigenvalues(eigsh(A, 2, block=4, max_products=3))
    drawn(ax)
    assert words_in(ax) == ["no eigenpairs: max products"]


def test_convergence_of_eigenpairs_is_their_history() -> None:
    found = eigsh(A, 2)
    ax = plot_convergence(found)
    drawn(ax)
    known = [entry for entry in found.history if entry[1] < float("inf")]
    assert list(ax.get_lines()[0].get_xdata()) == [entry[0] for entry in known]
    assert list(ax.get_lines()[0].get_ydata()) == [entry[1] for entry in known]
    assert "2 eigenpairs: converged" in texts(ax)


def test_the_products_that_check_for_missed_eigenpairs_are_told_from_the_search() -> None:
    found = eigsh(A, 2)
    ax = plot_convergence(found)
    (check,) = ax.patches
    assert check.get_x() == found.history[-1][0] < found.products
    assert check.get_x() + check.get_width() == found.products
    assert "check for missed pairs" in texts(ax)


@pytest.mark.parametrize("budget", [1, 2])
def test_eigenpairs_without_a_residual_are_drawn_as_words(budget: int) -> None:
    ax = plot_convergence(eigsh(A, 3, block=2, max_products=budget))
    drawn(ax)
    assert words_in(ax) == ["no residual: too few products"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_convergence_of_an_estimate_ends_at_its_value(sign: float) -> None:
    found = trace(sign * A, rtol=None, max_products=40, block=4)
    ax = plot_convergence(found)
    drawn(ax)
    assert ax.get_lines()[0].get_ydata()[-1] == pytest.approx(found.value)
    assert "95 % band" in texts(ax)


@pytest.mark.parametrize(
    "estimate",
    [
        lambda: logdet(P, block=64, rtol=0.5),
        lambda: trace(A, block=16, rtol=None, max_products=32),
    ],
)
def test_an_estimate_of_one_round_has_an_error_bar(estimate: Callable[[], Any]) -> None:
    found = estimate()
    assert len(found.history) == 1
    ax = plot_convergence(found)
    drawn(ax)
    ((bar,),) = [container[2] for container in ax.containers]
    ends = [y for _, y in bar.get_segments()[0]]
    assert ends == pytest.approx([found.low, found.high])
    assert "estimate, 95 % interval" in texts(ax)
    assert "band" not in texts(ax)


def test_convergence_of_a_diagonal_is_relative() -> None:
    found = diagonal(A, method="hutchinson", rtol=None, max_products=64)
    ax = plot_convergence(found)
    drawn(ax)
    assert "diagonal's norm" in texts(ax)


@pytest.mark.parametrize(
    "rest", [0.0, 1e-4, 1e-3, 1e-2, 1.0]
)  # beside the diagonal, which alone is exact
def test_the_label_of_a_diagonals_errors_is_not_cut_in_a_plain_figure(rest: float) -> None:
    figure, ax = plt.subplots()
    M = Dense(torch.diag(A.d) + rest, symmetric=True)
    plot_convergence(diagonal(M, method="hutchinson", rtol=None, max_products=64), ax=ax)
    drawn(ax)
    box = ax.yaxis.label.get_window_extent()
    assert box.x0 >= 0
    assert 0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_a_diagonal_of_zeros_is_drawn_as_words() -> None:
    ax = plot_convergence(diagonal(0.0 * A, method="hutchinson"))
    drawn(ax)
    assert words_in(ax) == ["the estimate is 0, or has no error"]


@pytest.mark.parametrize("columns", [1, 3])
def test_convergence_of_a_solve_has_a_line_for_each_system(columns: int) -> None:
    b = torch.ones(52, columns, dtype=F64) * torch.arange(1, columns + 1)
    result = cg(Damped(A, 2.0), b)
    ax = plot_convergence(result)
    drawn(ax)
    for i in range(columns):
        shown = torch.tensor(ax.get_lines()[i].get_ydata(), dtype=F64)
        torch.testing.assert_close(shown, result.history[:, i].double(), equal_nan=True)
    assert "converged" in texts(ax)
    assert "target" in texts(ax)


@pytest.mark.parametrize(
    ("solve", "quantity"),
    [
        (lambda b: cg(P, b), "residual norm"),
        (lambda b: cg(P, b[:, None][:, :0]), "residual norm"),
        (lambda b: multishift_cg(P, b, [0.1, 1.0]), "residual norm"),
        (lambda b: steihaug(P, b, 1.0), "residual norm"),
        (lambda b: lsmr(P, b), "gradient norm"),
        (matrix_function(P, "sqrt").evaluate, "error estimate"),
    ],
)
def test_a_right_hand_side_of_zeros_is_drawn_as_words(
    solve: Callable[[torch.Tensor], Any], quantity: str
) -> None:
    ax = plot_convergence(solve(0 * B))
    drawn(ax)
    assert words_in(ax) == [f"every {quantity} is 0"]
    assert "0 products" in ax.get_title() or "2 products" in ax.get_title()


def test_the_axis_says_what_a_solver_makes_small() -> None:
    assert "residual norm" in plot_convergence(cg(P, B)).get_ylabel()
    assert "gradient norm" in plot_convergence(lsmr(P, B)).get_ylabel()
    function = plot_convergence(matrix_function(P, "sqrt").evaluate(B))
    assert "error estimate" in function.get_ylabel()
    assert function.get_xlabel() == "checks"


def test_few_shifts_have_a_label_and_a_colour_each() -> None:
    b = B[:, None] * torch.tensor([1.0, 2.0], dtype=F64)
    ax = plot_convergence(multishift_cg(P, b, [1.0, 0.01, 0.1]))
    drawn(ax)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["shift 0.01", "shift 0.1", "shift 1", "target"]
    colours = [line.get_color() for line in ax.get_lines()[:6]]
    assert len(set(colours)) == 3
    assert colours[0] == colours[1]
    assert "3 shifts of 2 systems" in ax.get_title()


def test_of_many_shifts_the_smallest_and_the_largest_have_labels() -> None:
    ax = plot_convergence(multishift_cg(P, B, torch.linspace(1, 20, 20)))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["shift 1", "shift 20", "target"]


def test_one_step_has_ticks_that_can_be_read() -> None:
    g = torch.linspace(1, 2, 52, dtype=F64)
    ax = plot_convergence(steihaug(P, g, 0.1))
    drawn(ax)
    low, high = ax.get_ylim()
    assert high >= 10 * low
    shown = [tick.get_text() for tick in [*ax.get_yticklabels(), *ax.get_yticklabels(minor=True)]]
    assert not any("." in text for text in shown)
    assert all(tick == round(tick) for tick in ax.get_xticks())
    assert ax.get_title() == "1 step in a trust region: boundary, 1 product"


def test_one_is_not_many() -> None:
    one = Diagonal(torch.tensor([2.0], dtype=F64))
    top, density = eigsh(one, 1), spectral_density(one, steps=1, block=1, max_products=1 + 1)
    assert "1 eigenvalue: converged, 1 product\n" in plot_eigenvalues(top).get_title()
    assert "1 eigenpair: converged after 1 product" in plot_convergence(top).get_title()
    ax = plot_density(density, top)
    assert "Density of 1 eigenvalue " in ax.get_title()
    assert "1 node each" in ax.get_title()
    assert "1 eigenvalue found" in texts(ax)
    assert repr(top).startswith("<1 eigenpair, ")
    assert ", 1 product, converged>" in repr(top)
    assert "density of 1 eigenvalue from" in repr(density)
    assert " of 1 node, " in repr(density)
    shifted = multishift_cg(one, one.d, [1.0])
    assert plot_convergence(shifted).get_title().startswith("1 shift: ")
    assert repr(shifted).startswith("<1 shift: converged after 1 step, 2 products;")
    assert "after 1 step, 2 products" in repr(cg(one, one.d))
    assert plot_convergence(cg(one, one.d)).get_title().startswith("1 system: ")
    assert "after 1 product: step" in repr(steihaug(one, one.d, 0.1))


def test_a_model_that_cannot_decrease_decreases_by_zero() -> None:
    assert "model decrease 0," in repr(steihaug(P, 0 * B, 1.0))


def test_an_eigenvector_is_shown_by_parameter() -> None:
    found = eigsh(A, 2)  # the top two are entries 50 and 51, the bias
    ax = plot_eigenvector(found, LAYOUT)
    drawn(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["weight", "bias"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.0, 1.0], abs=1e-9)
    assert "eigenvalue 5" in ax.get_title()
    assert "eigenvalue 3" in plot_eigenvector(found, LAYOUT, 0).get_title()


def test_of_very_many_parameters_the_largest_are_shown_and_the_rest_summed() -> None:
    layout = Layout(tuple(f"p{i}" for i in range(52)), tuple(torch.Size([1]) for _ in range(52)))
    ax = plot_eigenvector(eigsh(A, 2), layout)
    drawn(ax)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 40
    assert labels[-1] == "13 others"
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(1.0)


def test_a_picture_goes_where_it_is_told() -> None:
    _, axes = plt.subplots(2, 2)
    found = eigsh(A, 2)
    assert plot_eigenvalues(found, ax=axes[0, 0]) is axes[0, 0]
    assert plot_convergence(found, ax=axes[0, 1]) is axes[0, 1]
    assert plot_eigenvector(found, LAYOUT, ax=axes[1, 0]) is axes[1, 0]
    assert plot_density(spectral_density(A), ax=axes[1, 1]) is axes[1, 1]


def test_misuse_is_refused() -> None:
    found = eigsh(A, 2)
    with pytest.raises(ValueError, match="layout of the 52 entries"):
        plot_eigenvector(found, Layout(("w",), (torch.Size([3]),)))
    with pytest.raises(IndexError, match="2 eigenvectors, got 2"):
        plot_eigenvector(found, LAYOUT, 2)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: plot_density(trace(A)),
            r"plot_density expects density to be a Density from hvpop\.spectrum\.spectral_density, "
            "got Estimate; plot_convergence draws that",
        ),
        (lambda: plot_density(eigsh(A, 2)), "got Eigenpairs; plot_eigenvalues draws that"),
        (
            lambda: plot_density(spectral_density(A), B),
            r"expects eigenvalues to be Eigenpairs from hvpop\.spectrum\.eigsh, got Tensor$",
        ),
        (
            lambda: plot_convergence(spectral_density(A)),
            r"plot_convergence expects result .* got Density; plot_density draws that",
        ),
        (lambda: plot_convergence(cg(P, B).x), r"hvpop\.solvers returns, got Tensor$"),
        (lambda: plot_eigenvalues(B), "plot_eigenvalues expects eigenpairs .* got Tensor"),
        (lambda: plot_eigenvector(B, LAYOUT), "plot_eigenvector expects eigenpairs .* got Tensor"),
        (
            lambda: plot_eigenvector(eigsh(A, 2), None),
            "expects layout to be a Layout, such as a HessianOperator's `layout`, got NoneType",
        ),
        (
            lambda: plot_eigenvector(eigsh(A, 2), LAYOUT, "weight"),
            "expects index to be an integer, got str",
        ),
        (
            lambda: plot_convergence(cg(P, B), ax=3),
            r"plot_convergence expects ax to be one matplotlib Axes, .* got int; leave it out",
        ),
        (
            lambda: plot_density(spectral_density(A), ax=plt),
            "plot_density expects ax .* got module",
        ),
        (lambda: plot_eigenvalues(eigsh(A, 2), ax=[]), "plot_eigenvalues expects ax .* got list"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(draw: Callable[[], Axes], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        draw()
    assert plt.get_fignums() == []


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'hvpop\[plot\]'"):
        plot_eigenvalues(eigsh(A, 2))
