"""Pictures: each takes a result, returns Axes, and says on it what it shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from hvpop import Damped, Diagonal, Layout
from hvpop.plotting import plot_convergence, plot_density, plot_eigenvalues, plot_eigenvector
from hvpop.solvers import cg
from hvpop.spectrum import diagonal, eigsh, spectral_density, trace

F64 = torch.float64
A = Diagonal(torch.cat([torch.linspace(-1, 1, 50), torch.tensor([3.0, 5.0])]).to(F64))
LAYOUT = Layout(("weight", "bias"), (torch.Size([5, 10]), torch.Size([2])))


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def texts(ax: Axes) -> str:
    legend = ax.get_legend()
    entries = [] if legend is None else [text.get_text() for text in legend.get_texts()]
    return "\n".join([ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *entries])


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


def test_convergence_of_eigenpairs_is_their_history() -> None:
    found = eigsh(A, 2)
    ax = plot_convergence(found)
    drawn(ax)
    known = [entry for entry in found.history if entry[1] < float("inf")]
    assert list(ax.get_lines()[0].get_xdata()) == [entry[0] for entry in known]
    assert list(ax.get_lines()[0].get_ydata()) == [entry[1] for entry in known]
    assert "2 eigenpairs: converged" in texts(ax)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_convergence_of_an_estimate_ends_at_its_value(sign: float) -> None:
    found = trace(sign * A, rtol=None, max_products=60, block=4)
    ax = plot_convergence(found)
    drawn(ax)
    assert ax.get_lines()[0].get_ydata()[-1] == pytest.approx(found.value)
    assert "95 % band" in texts(ax)


def test_convergence_of_a_diagonal_is_relative() -> None:
    found = diagonal(A, method="hutchinson", rtol=None, max_products=64)
    ax = plot_convergence(found)
    drawn(ax)
    assert "diagonal's norm" in texts(ax)


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


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import hvpop.plotting, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'hvpop\[plot\]'"):
        plot_eigenvalues(eigsh(A, 2))
