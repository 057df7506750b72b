"""What the server of processes has loaded when it forks: a world then starts in 0.4 s."""

from __future__ import annotations

import pytest  # noqa: F401
import torch
import torch.distributed.fsdp
import torch.fx.experimental.proxy_tensor

import hvpop.distributed
import hvpop.solvers
import hvpop.spectrum  # noqa: F401

torch.set_num_threads(1)
