"""What every test runs under: one thread, and examples that are the same in every run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("hvpop", deadline=None, derandomize=True, max_examples=24)
settings.load_profile("hvpop")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch, 1 by default")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads"))
