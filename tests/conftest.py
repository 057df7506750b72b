"""What every test runs under: one thread, and examples that are the same in every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import distributed

settings.register_profile("hvpop", deadline=None, derandomize=True, max_examples=24)
settings.load_profile("hvpop")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch, 1 by default")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads"))


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    """What a page or an example has begun for several processes ends with it."""
    yield
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
