"""What the commands print, where, and how they end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from hvpop import HessianOperator, __version__
from hvpop.cli.commands import app
from hvpop.spectrum import eigsh, trace

SOURCE = """
import torch
from torch import nn
from hvpop import Diagonal, EmpiricalRisk

def make():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(21, 3).double(), torch.randint(2, (21,))
    return model, nn.CrossEntropyLoss(), list(zip(x.split(8), y.split(8)))

model = nn.Linear(3, 2)

def risk():
    return EmpiricalRisk(*make())

def operator():
    return Diagonal(torch.arange(1.0, 31.0).double())

def nothing():
    return 3

def broken():
    raise RuntimeError("no such file of mine")

def needy(where):
    return make()

def narrow():
    model, loss, data = make()
    return model, loss, [(x[:, :2], y) for x, y in data]

def turned():
    model, loss, data = make()
    return loss, model, data

def spoilt():
    model, loss, data = make()
    model[0].weight.data[0, 0] = float("nan")
    return model, loss, data

class Strict(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x.missing

def strict():
    return Strict(), nn.MSELoss(), [(torch.ones(6, 2), torch.ones(6, 2))]

class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(2).double()), [1.0]

    def forward(self, x):
        self.calls[0] *= 1.5  # another function at every call
        return x @ self.weight.square() * self.calls[0]

def sick():
    x = torch.randn(6, 2).double()
    return Forgetful(), nn.MSELoss(), [(x, x[:, 0])]
"""


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "train", raising=False)


@pytest.fixture
def target() -> str:
    return "train.py:make"


def hvpop(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def reference(seed: int = 0) -> HessianOperator:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(21, 3).double(), torch.randint(2, (21,))
    return HessianOperator(
        model, nn.CrossEntropyLoss(), list(zip(x.split(8), y.split(8), strict=True)), seed=seed
    )


def test_spectrum_prints_what_the_functions_give(target: str) -> None:
    result = hvpop("spectrum", target, "--k", "3", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    A = reference().linearize()
    pairs = eigsh(A, 3, data_error=True)
    assert found["eigenvalues"]["eigenvalues"] == pairs.eigenvalues.tolist()
    assert found["eigenvalues"]["residuals"] == pairs.residuals.tolist()
    assert pairs.data_errors is not None
    assert found["eigenvalues"]["data_errors"] == pairs.data_errors.tolist()
    assert found["trace"]["value"] == trace(A, data_error=True).value


def test_the_result_is_on_stdout_and_all_else_on_stderr(target: str) -> None:
    result = hvpop("spectrum", target)
    assert "eigenvalues (LA): converged" in result.stdout
    assert "trace: " in result.stdout
    assert "is your code" not in result.stdout
    assert "running train.py:make, which is your code" in result.stderr
    assert "a product is a pass" in result.stderr


def test_equal_runs_give_equal_bytes(target: str) -> None:
    runs = [hvpop("spectrum", target, "--json", "--seed", "3").stdout for _ in range(2)]
    assert runs[0] == runs[1]
    assert hvpop("spectrum", target, "--json", "--seed", "4").stdout != runs[0]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("train.py", "TARGET is package.module:function or file.py:function"),
        ("train.py:", "TARGET is package.module"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("no.such.module:make", "there is no module no.such.module"),
        ("train.py:mak", "train.py has no mak; it has make, risk"),
        ("train.py:nothing", "returned int; TARGET is"),
        ("train.py:model", "train.py:model is a model, a Linear; TARGET is"),
        ("train.py:broken", "train.py:broken raised RuntimeError: no such file of mine ("),
        ("train.py:needy", "cannot be called with nothing: missing a required argument: 'where'"),
        (
            "train.py:narrow",
            "RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x2 and 3x4)",
        ),
        ("train.py:strict", "/train.py:"),
        ("train.py:turned", "returned (CrossEntropyLoss, Sequential, list), and the first has no"),
    ],
)
def test_a_bad_target_gets_one_line(target: str, says: str) -> None:
    result = hvpop("spectrum", target)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [x for x in result.stderr.splitlines() if not x.startswith(("running ", "<"))]
    assert line.startswith("hvpop: ")
    assert says in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--params", "9.*"], "matches no trainable parameter"),
        (["--weights", "train.py"], "cannot be read as weights alone"),
        (["--weights", "nowhere.pt"], "--weights: there is no file nowhere.pt"),
        (["--device", "moon"], "--device moon is not to be had here: "),
        (["--which", "XX"], "Invalid value"),
        (["--k", "0"], "Invalid value"),
        (["--checkpoint", "train.py"], "expects checkpoint to be a folder, or room for one"),
        (["--matrix", "inverse"], "Invalid value"),
    ],
)
def test_what_cannot_be_is_wrong_usage(target: str, options: list[str], says: str) -> None:
    result = hvpop("spectrum", target, *options)
    assert result.exit_code == 2
    assert says in result.stderr


def test_options_choose_the_matrix_the_parameters_and_the_data(target: str) -> None:
    shown = hvpop("spectrum", target, "--matrix", "gauss-newton", "--params", "0.*").stdout
    assert shown.startswith("<16x16 GaussNewtonOperator float64 cpu>")
    fisher = hvpop("spectrum", target, "--matrix", "fisher", "--k", "1")
    assert fisher.stdout.startswith("<26x26 FisherOperator float64 cpu>")
    one = json.loads(hvpop("spectrum", target, "--data-batches", "1", "--json").stdout)
    H = reference()
    first = HessianOperator(H.risk.model, nn.CrossEntropyLoss(), list(H.risk._data)[:1])
    assert one["eigenvalues"]["eigenvalues"] == eigsh(first, 5).eigenvalues.tolist()
    assert one["eigenvalues"]["data_errors"] is None  # one batch has no spread


def test_a_risk_and_an_operator_are_targets(target: str) -> None:
    of_risk = json.loads(hvpop("spectrum", "train.py:risk", "--json").stdout)
    assert of_risk == json.loads(hvpop("spectrum", target, "--json").stdout)
    result = hvpop("spectrum", "train.py:operator", "--k", "1")
    assert result.exit_code == 0
    assert "30 " in result.stdout
    assert hvpop("spectrum", "train.py:operator", "--matrix", "hessian").exit_code == 2
    assert hvpop("check", "train.py:operator").exit_code == 2


def test_weights_are_loaded_as_weights_only(target: str, tmp_path: Path) -> None:
    H = reference(seed=9)
    torch.save(H.risk.model.state_dict(), tmp_path / "weights.pt")
    found = json.loads(hvpop("spectrum", target, "--weights", "weights.pt", "--json").stdout)
    there = json.loads(hvpop("spectrum", target, "--json").stdout)
    assert found["provenance"]["parameters"] != there["provenance"]["parameters"]
    assert found["provenance"]["data"] == there["provenance"]["data"]
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "others.pt")
    result = hvpop("spectrum", target, "--weights", "others.pt")
    assert result.exit_code == 2
    assert "hvpop: --weights others.pt does not fit the model: " in result.stderr
    torch.save(H.risk.model, tmp_path / "model.pt")  # a pickle, which could run anything
    assert hvpop("spectrum", target, "--weights", "model.pt").exit_code == 2


def test_check_is_fine_or_finds(target: str) -> None:
    result = hvpop("check", target)
    assert result.exit_code == 0
    assert "verdict: healthy" in result.stdout
    result = hvpop("check", "train.py:sick", "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["healthy"]
    assert "the parameters 0.weight are not finite" in hvpop("check", "train.py:spoilt").stdout


def test_a_budget_that_was_too_small_is_a_finding(target: str) -> None:
    result = hvpop("spectrum", target, "--k", "3", "--max-products", "4")
    assert result.exit_code == 1
    assert "finding: eigenvalues: max products" in result.stderr
    assert "--max-products N allows for more" in result.stderr


@pytest.mark.parametrize(("command", "least"), [("spectrum", 4), ("report", 6)])
def test_a_budget_that_no_number_can_do_with_is_seen_before_anything_runs(
    target: str, command: str, least: int
) -> None:
    result = hvpop(command, target, "--k", "1", "--max-products", str(least - 1))
    assert result.exit_code == 2
    assert "running" not in result.stderr
    assert hvpop(command, target, "--k", "1", "--max-products", str(least)).exit_code == 1


def test_compare_says_which_numbers_differ(target: str, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "5")):
        text = hvpop("spectrum", target, "--json", "--seed", seed).stdout
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    same = hvpop("compare", "a.json", "b.json")
    assert same.exit_code == 0
    assert "none of 6 numbers differs by more than its error" in same.stdout
    other = hvpop("compare", "a.json", "c.json", "--json")
    rows = json.loads(other.stdout)["rows"]
    assert other.exit_code == int(any(row["differs"] for row in rows))
    checked = hvpop("check", target, "--json").stdout
    (tmp_path / "check.json").write_text(checked, encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    for bad, says in (
        ("train.py", "train.py is no JSON: "),
        ("no.json", "no.json: No such file"),
        ("check.json", "check.json is none of these"),
        ("list.json", "list.json is none of these"),
    ):
        result = hvpop("compare", "a.json", bad)
        assert result.exit_code == 2
        assert says in result.stderr


def test_the_version_is_told() -> None:
    assert hvpop("--version").stdout == f"hvpop {__version__}, torch {torch.__version__}\n"


def test_an_interrupt_gives_what_there_is_and_says_how_to_go_on(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hvpop.report.analysis.trace", interrupted)
    result = hvpop("spectrum", target, "--checkpoint", "states")
    assert result.exit_code == 130
    assert "eigenvalues (LA): converged" in result.stdout
    assert "to go on from where it stopped" in result.stderr
    assert Path("states/eigenvalues.pt").exists()


def test_report_writes_a_page_and_the_demo_needs_nothing(target: str, tmp_path: Path) -> None:
    result = hvpop("report", target, "-o", "page.html", "--k", "1", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["which"] == "BE"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;26x26 HessianOperator float64 cpu&gt;" in page
    for path in ("nowhere/page.html", "."):
        result = hvpop("report", target, "-o", path)
        assert result.exit_code == 2
        assert "running" not in result.stderr
