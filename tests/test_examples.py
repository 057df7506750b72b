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
    losses = load("levenberg_marquardt").main(steps=32)
    assert losses[-1] < 1e-3 * losses[0]
    assert losses == sorted(losses, reverse=True)  # only steps that help are taken
    assert "Marquardt float64 cpu" in capsys.readouterr().out


def test_the_deflated_hessian_has_the_next_eigenvalues(capsys: pytest.CaptureFixture[str]) -> None:
    k = 4
    following = load("deflation").main(k)
    assert following.shape == (k,)
    assert np.all(np.diff(following) <= 0)
    assert "symmetric: True" in capsys.readouterr().out


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    missing = [p.stem for p in EXAMPLES.glob("*.py") if f'load("{p.stem}")' not in source]
    assert not missing
