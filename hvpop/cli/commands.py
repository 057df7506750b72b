"""The commands: ``check``, ``spectrum``, ``report``, ``compare``, ``demo``."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from .. import __version__
from ..curvature.kinds import MATRICES
from ..operators import LinearOperator
from ..report import PARTS, Analysis, analyze, render
from ..report import compare as compared
from .demo import digits
from .target import UsageError, failure, function_of, operator_of, users_code
from .words import shown

FINE, FINDING, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="hvpop",
    epilog="Exit codes: 0 fine, 1 a finding, 2 wrong usage, 130 interrupted. Results go to stdout, all "
    "else to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Matrix = Enum("Matrix", {name: name for name in MATRICES}, type=str)  # type: ignore[misc]
Which = Enum("Which", {name: name for name in ("LA", "SA", "LM", "SM", "BE")}, type=str)  # type: ignore[misc]

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="package.module:function or file.py:function, returning (model, loss, data), a risk or an "
        "operator. Its code is run.",
        show_default=False,
    ),
]
MatrixOption = Annotated[
    Matrix | None, typer.Option("--matrix", help="Which matrix; the Hessian by default.")
]
Params = Annotated[
    list[str] | None,
    typer.Option("--params", metavar="GLOB", help="Only these parameters; may be repeated."),
]
K = Annotated[int, typer.Option("--k", min=1, help="Eigenvalues (of each end with --which BE).")]
DataBatches = Annotated[
    int | None, typer.Option("--data-batches", min=1, help="Only the first batches of the data.")
]
Device = Annotated[str | None, typer.Option("--device", help="Where the model is moved to: cuda.")]
Seed = Annotated[
    int, typer.Option("--seed", help="Of torch before TARGET is called, and of the estimates.")
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="A state_dict to load into the model; read as weights only."),
]
CheckpointFolder = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="DIR", help="Keep states there, and go on from them."),
]
BUDGET = "Of each number; what tells the error of the data comes to it."
Budget = Annotated[
    int | None, typer.Option("--max-products", min=4, help=BUDGET)
]  # the least that the trace takes; for a report, that the norm does: seen before anything runs
ReportBudget = Annotated[int | None, typer.Option("--max-products", min=6, help=BUDGET)]
Json = Annotated[
    bool, typer.Option("--json", help="Machine-readable, the same bytes from equal runs.")
]


def _writable(output: Path) -> Path:
    """Seen before anything runs, which may take long."""
    there = output.exists()
    try:
        with output.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"expects a file in a folder that exists, to write to, got {output}: {error.strerror}"
        ) from error
    if not there:
        output.unlink()
    return output


Output = Annotated[
    Path, typer.Option("--output", "-o", callback=_writable, help="The page to write.")
]


@app.command()
def check(
    target: Target,
    matrix: MatrixOption = None,
    params: Params = None,
    data_batches: DataBatches = None,
    device: Device = None,
    weights: Weights = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The doctor: whether products are the derivative of the gradient. Finds 1 if not."""
    H = _operator(target, matrix, params, data_batches, device, weights, seed)
    look = getattr(H, "check", None)
    if look is None:
        _usage(f"{H!r} has no check; return (model, loss, data) or a risk")
    found = look()
    if as_json:
        findings = [{"level": f.level, "what": f.what, "detail": f.detail} for f in found.findings]
        _print_json(
            {
                "format": 1,
                "operator": repr(H),
                "healthy": found.healthy,
                "verdict": found.verdict,
                "findings": findings,
            }
        )
    else:
        print(f"{H!r}\n{found}\nlooked at: the first batch")
    raise typer.Exit(FINE if found.healthy else FINDING)


@app.command()
def spectrum(
    target: Target,
    matrix: MatrixOption = None,
    params: Params = None,
    k: K = 5,
    which: Annotated[
        Which, typer.Option("--which", help="Largest, smallest, either in size, both ends.")
    ] = Which.LA,  # type: ignore[attr-defined]
    data_batches: DataBatches = None,
    device: Device = None,
    weights: Weights = None,
    seed: Seed = 0,
    max_products: Budget = None,
    checkpoint: CheckpointFolder = None,
    as_json: Json = False,
) -> None:
    """Eigenvalues with residuals and the trace with its error bars."""
    H = _operator(target, matrix, params, data_batches, device, weights, seed)
    parts = ["eigenvalues", "trace"]
    _analyze(H, parts, None, k, which.value, max_products, seed, checkpoint, as_json)


@app.command()
def report(
    target: Target,
    output: Output = Path("report.html"),
    matrix: MatrixOption = None,
    params: Params = None,
    k: K = 5,
    which: Annotated[Which, typer.Option("--which", help="As for spectrum.")] = Which.BE,  # type: ignore[attr-defined]
    data_batches: DataBatches = None,
    device: Device = None,
    weights: Weights = None,
    seed: Seed = 0,
    max_products: ReportBudget = None,
    checkpoint: CheckpointFolder = None,
    as_json: Json = False,
) -> None:
    """All there is to know, as one HTML page; --json: on stdout, too."""
    H = _operator(target, matrix, params, data_batches, device, weights, seed)
    _analyze(H, PARTS, output, k, which.value, max_products, seed, checkpoint, as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="What --json wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Json = False,
) -> None:
    """Which numbers of two runs differ by more than their errors. Finds 1 if any does."""
    expected = (
        "compare expects two files that `hvpop spectrum --json` or `hvpop report --json` wrote"
    )
    read = []
    for path in (a, b):
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            _usage(f"{expected}: {path}: {error.strerror}")
        except ValueError as error:
            _usage(f"{expected}: {path} is no JSON: {error}")
        if not isinstance(given, dict) or "provenance" not in given:
            _usage(f"{expected}: {path} is none of these")
        read.append(given)
    try:
        found = compared(*read)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        _usage(f"{expected}: {error}")
    _print_json(found.as_dict()) if as_json else print(found)
    if not found.rows:
        _usage(f"{expected}: {a} and {b} have no number in common")
    raise typer.Exit(FINDING if found.differing else FINE)


@app.command()
def demo(
    output: Output = Path("hvpop-demo.html"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A report on a small network, with nothing given."""
    _tell("training a 64-16-10 network on handwritten digits, on the CPU")
    with _usage_errors():
        H = operator_of(digits(seed), target="hvpop demo", seed=seed)
    _analyze(H, PARTS, output, 5, "BE", None, seed, None, as_json)


def _version(asked: bool) -> None:
    if asked:
        print(f"hvpop {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """The Hessian of a PyTorch model from the command line."""


# -- what they share ------------------------------------------------------------------------------


def _operator(
    target: str,
    matrix: Any,
    params: list[str] | None,
    batches: int | None,
    device: str | None,
    weights: Path | None,
    seed: int,
) -> LinearOperator:
    _tell(f"running {target}, which is your code")
    with _usage_errors():
        function = function_of(target)
        torch.manual_seed(seed)
        with users_code(target):
            made = function()
        return operator_of(
            made,
            target=target,
            matrix=None if matrix is None else matrix.value,
            params=params or None,
            batches=batches,
            device=device,
            weights=weights,
            seed=seed,
        )


def _analyze(
    H: LinearOperator,
    parts: Collection[str],
    output: Path | None,
    k: int,
    which: Any,
    max_products: int | None,
    seed: int,
    checkpoint: Path | None,
    as_json: bool,
) -> NoReturn:
    """What stdout, the page and the exit code say of an operator."""
    _tell(repr(H))
    with _usage_errors():
        cost = H.cost() if hasattr(H, "cost") else None
        if cost is not None:
            _tell(str(cost))
        found = analyze(
            H, k=k, which=which, parts=parts, max_products=max_products, seed=seed,
            progress=sys.stderr.isatty(), checkpoint=checkpoint, cost=cost,
        )  # fmt: skip
    if output is not None:
        page = render(found, command=_command())
    _print_json(found.as_dict()) if as_json else print(shown(found))
    if output is not None:
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:  # full, say: what was found is on stdout
            _usage(f"cannot write {output}: {error.strerror}")
        _tell(f"wrote {output}")
    _end(found, checkpoint)


def _end(found: Analysis, checkpoint: Path | None) -> NoReturn:
    for finding in found.findings:
        _tell(f"finding: {finding}")
    if any("max products" in finding for finding in found.findings):
        _tell("the budget of products was too small: --max-products N allows for more")
    if found.interrupted or any("interrupted" in finding for finding in found.findings):
        again = _command() if checkpoint is not None else f"{_command()} --checkpoint DIR"
        _tell(f"to go on {'' if checkpoint else 'next time '}from where it stopped: {again}")
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(FINDING if found.findings else FINE)


def _command() -> str:
    return shlex.join(["hvpop", *sys.argv[1:]])


def _print_json(thing: dict[str, Any]) -> None:
    print(json.dumps(thing, indent=1))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _usage(message: str) -> NoReturn:
    _tell(f"hvpop: {message}")
    raise typer.Exit(USAGE)


class _usage_errors:  # noqa: N801 (used like a function)
    """What cannot be done with what was given is one line; warnings go to stderr, a line each."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._warnings.__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            _tell("interrupted before there was anything to show")
            raise typer.Exit(INTERRUPTED)
        if isinstance(error, UsageError | ValueError | TypeError | FloatingPointError | OSError):
            _usage(" ".join(str(error).split()))
        if isinstance(error, Exception) and not isinstance(error, typer.Exit):
            _usage(failure(error))  # 1, which Python would exit with, is a finding
