"""What every test runs under: one thread, and examples that are the same in every run."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("hvpop", deadline=None, derandomize=True, max_examples=24)
settings.load_profile("hvpop")
