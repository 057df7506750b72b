"""The examples run and give what they say; small settings, so that the suite stays short."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # a dataclass looks its module up by name
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_number_of_the_digits_demo_is_what_it_must_be(
    somewhere_else: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load("digits").main(hidden=8)
    shown = capsys.readouterr()
    assert len(rows) >= 9
    assert all(row.holds for row in rows)
    errors = {row.what: row.found for row in rows}
    assert errors["eigsh: ten eigenvalues, worst against dense"] < 1e-10
    assert errors["batch averaged, against full"] < 1e-12
    assert all(row.what in shown.out for row in rows)
    assert "<610x610 HessianOperator float64 cpu>" in shown.out
    assert "eigsh" in shown.err  # the progress bars
    picture = somewhere_else / "output" / "digits-spectrum.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_digits_demo_fails_aloud_if_a_number_is_wrong() -> None:
    with pytest.raises(SystemExit, match="not as it must be: training: accuracy"):
        load("digits").main(hidden=2, epochs=0)


def test_levenberg_marquardt_fits_the_curve(capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("levenberg_marquardt").main()
    assert losses[-1] < 1e-3 * losses[0]
    assert losses == sorted(losses, reverse=True)  # only steps that help are taken
    assert "Marquardt float64 cpu" in capsys.readouterr().out


def test_the_deflated_hessian_has_the_next_eigenvalues(capsys: pytest.CaptureFixture[str]) -> None:
    k = 4
    following = load("deflation").main(k)
    assert following.shape == (k,)
    assert np.all(np.diff(following) <= 0)
    assert "symmetric: True" in capsys.readouterr().out


def test_influence_predicts_what_leaving_an_image_out_does(
    somewhere_else: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = 3
    table = load("influence").main(few)
    shown = capsys.readouterr()
    assert len(table) == 2 * few
    assert all(row.predicted < 0 and row.actual < 0 for row in table[:few])
    assert all(row.predicted > 0 and row.actual > 0 for row in table[few:])
    assert "correlation" in shown.out
    assert "retraining without one" in shown.err  # the progress bar
    picture = somewhere_else / "output" / "influence.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_influence_example_fails_aloud_if_a_prediction_is_wrong() -> None:
    example = load("influence")
    wrong = [example.LeftOut(0, 1, 0.1, -0.1), example.LeftOut(1, 1, -0.2, 0.1)]
    with pytest.raises(SystemExit, match="a prediction has the wrong sign"):
        example.check(wrong, slope=0.0, residual=0.0)


def test_the_sharpness_rises_to_what_the_step_bears(
    somewhere_else: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("sharpness")
    course = example.main(steps=1500, every=25)
    shown = capsys.readouterr()
    assert course.sharpness[0] < 0.5 * 2 / example.STEP
    assert abs(course.sharpness[-1] * example.STEP / 2 - 1) < 0.1
    assert course.warm < 1.1 * course.cold  # a start that was given rules no missing copy out
    assert all(estimate.status == "converged" for estimate in course.traces)
    assert "FAILED" not in shown.out
    picture = somewhere_else / "output" / "sharpness.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_newton_reaches_the_minimum_of_l_bfgs_with_less_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    newton, lbfgs = load("newton").main(images=700)
    assert newton.loss == pytest.approx(lbfgs.loss, abs=1e-7)
    assert newton.gradients + newton.products < lbfgs.gradients
    assert newton.steps < lbfgs.steps / 10
    assert "Newton-CG" in capsys.readouterr().out


def test_gauss_newton_ends_where_least_squares_does(capsys: pytest.CaptureFixture[str]) -> None:
    squares, scipys = load("gauss_newton").main()
    assert squares == sorted(squares, reverse=True)
    assert squares[-1] == pytest.approx(scipys, rel=1e-6)
    assert "<400x9 JacobianOperator float64 cpu>" in capsys.readouterr().out


def test_a_spectrum_over_processes_is_that_of_one_alone(
    somewhere_else: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load("distributed_spectrum").main(k=2)
    assert (np.load(somewhere_else / "output" / "eigenvalues.npy") == found).all()
    assert "2 largest eigenvalues, converged" in capsys.readouterr().out


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    missing = [p.stem for p in EXAMPLES.glob("*.py") if f'load("{p.stem}")' not in source]
    assert not missing
