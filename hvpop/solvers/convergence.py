"""A product whose solver did not converge: the warning, at the caller's line, with the cure."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy
import scipy
import torch


class NotConverged(RuntimeWarning):
    """A product was returned although its solver did not reach its tolerance."""


def warn(message: str) -> None:
    """Warn with `NotConverged` at the first line outside of hvpop, SciPy, NumPy and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, NotConverged, stacklevel=level)


def cure(status: tuple[str, ...]) -> str:
    """What to do about the worst of the statuses."""
    return next((what for name, what in _CURES.items() if name in status), "")


_FOLDERS = [Path(__file__).parents[1]]
_FOLDERS += [Path(str(module.__file__)).parent for module in (scipy, numpy, torch)]
_OURS = tuple(f"{folder}{os.sep}" for folder in _FOLDERS)
_CURES = {
    "negative curvature": "it is not positive definite: damp it more, or solve by minres",
    "stagnated": "rounding allows no more, or it is singular: loosen rtol, damp it, or take float64",
    "max steps": "allow more max_steps, precondition, damp it more, or loosen rtol",
    "interrupted": "run it again",
}
