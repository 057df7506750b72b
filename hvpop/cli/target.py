"""What a target names: a function of the user's that makes a model, a loss and data."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..curvature import kinds
from ..curvature.live import Live
from ..operators import LinearOperator
from ..risk import EmpiricalRisk, autoencoder, hugging_face, supervised

EXPECTED = (
    "TARGET is package.module:function or file.py:function, a function without arguments that returns "
    "(model, loss, data), an EmpiricalRisk or an operator"
)


class UsageError(Exception):
    """What was asked for cannot be; the message is one line that says what was expected."""


def function_of(target: str) -> Callable[[], Any]:
    """The function that a target names; imports its module, which runs the user's code."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UsageError(f"{EXPECTED}; got {target!r}")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    found = getattr(module, name, None)
    if found is None:
        there = [
            n
            for n, f in vars(module).items()
            if callable(f) and getattr(f, "__module__", "") == module.__name__
        ]
        raise UsageError(f"{place} has no {name}; it has {', '.join(there[:8]) or 'no functions'}")
    if not callable(found):
        raise UsageError(f"{target} is no function but {found!r:.40}; {EXPECTED}")
    if isinstance(found, nn.Module):
        raise UsageError(f"{target} is a model, a {type(found).__name__}; {EXPECTED}")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UsageError(f"{target} cannot be called with nothing: {error}; {EXPECTED}") from error
    except ValueError:  # a builtin's, which does not tell its arguments
        pass
    return found  # type: ignore[no-any-return]


def _file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; {EXPECTED}")
    name = re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` has it
    sys.modules[name] = module  # dataclasses and pickles look themselves up
    with users_code(str(path)):
        spec.loader.exec_module(module)
    return module


def _module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m name` has it
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UsageError(f"there is no module {name} here or installed; {EXPECTED}")
    with users_code(name):
        return importlib.import_module(name)


class users_code:  # noqa: N801 (used like a function)
    """What fails inside is the user's, and is told in a line with its place."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, KeyboardInterrupt | UsageError):
            return
        raise UsageError(f"{self.what} raised {failure(error)}") from error


def failure(error: BaseException) -> str:
    """An exception and where it came from, in one line: the user's code, if that was reached."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = str(Path(torch.__file__).parents[1]), str(Path(__file__).parents[1])
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    place = (own or frames)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({place.filename}:{place.lineno})"


def operator_of(
    made: Any,
    *,
    target: str,
    matrix: str | None = None,
    params: list[str] | None = None,
    batches: int | None = None,
    device: str | None = None,
    weights: Path | None = None,
    seed: int = 0,
) -> LinearOperator:
    """The operator that a target's function stands for, by the options of the command."""
    if isinstance(made, LinearOperator):
        fixed = {
            "--matrix": matrix,
            "--data-batches": batches,
            "--device": device,
            "--weights": weights,
        }
        given = [name for name, value in fixed.items() if value is not None]
        if given:
            raise UsageError(
                f"{target} returns an operator, which {given[0]} cannot change; return (model, loss, data)"
            )
        return made if params is None else _block(made, params)
    kind = kinds.matrix(matrix or "hessian")
    if isinstance(made, EmpiricalRisk):
        if batches is not None:
            raise UsageError(
                f"{target} returns a risk, which --data-batches cannot shorten; return (model, loss, data)"
            )
        _place(made.model, device, weights)
        H: Live = kind.from_risk(made)
        return H if params is None else _block(H, params)
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module):
        got = (
            f"({', '.join(type(x).__name__ for x in made)})"
            if isinstance(made, tuple)
            else type(made).__name__
        )
        raise UsageError(f"{target} returned {got}; {EXPECTED}")
    model, loss, data = made
    if isinstance(loss, nn.Module) and not any(True for _ in model.parameters()):
        kinds_of = ", ".join(type(x).__name__ for x in made)
        raise UsageError(
            f"{target} returned ({kinds_of}), and the first has no parameters; {EXPECTED}"
        )
    _place(model, device, weights)
    if batches is not None:
        data = list(islice(data, batches))
    own = isinstance(loss, supervised | autoencoder | hugging_face)
    build = EmpiricalRisk.from_batch_loss if own else EmpiricalRisk
    return kind.from_risk(build(model, loss, data, params=params, seed=seed))


def _block(H: LinearOperator, params: list[str]) -> LinearOperator:
    block = getattr(H, "block", None)
    if block is None:
        raise UsageError(
            f"{H!r} has no blocks, so that --params cannot choose; return (model, loss, data)"
        )
    chosen: LinearOperator = block(params)
    return chosen


def _place(model: nn.Module, device: str | None, weights: Path | None) -> None:
    """The user's weights, read as data and never as code, and the device."""
    if weights is not None:
        if not weights.is_file():
            raise UsageError(f"--weights: there is no file {weights}")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UsageError(
                f"--weights {weights} cannot be read as weights alone ({type(error).__name__}); "
                "save model.state_dict()"
            ) from error
        with _option(f"--weights {weights} does not fit the model"):
            model.load_state_dict(state)
    if device is not None:
        with _option(f"--device {device} is not to be had here"):
            model.to(device)


@contextmanager
def _option(failed: str) -> Iterator[None]:
    """What torch says about an option's value comes with the option."""
    try:
        yield
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"{failed}: {' '.join(str(error).split())}") from error
