"""What the server of processes has loaded when it forks: a world then starts in 0.1 s."""

from __future__ import annotations

import pytest  # noqa: F401
import torch
import torch._decomp.decompositions_for_jvp  # what forward mode, optimizers and DDP import, for a second each
import torch._dynamo
import torch.distributed.fsdp
import torch.fx.experimental.proxy_tensor

import hvpop.distributed
import hvpop.solvers
import hvpop.spectrum  # noqa: F401

torch.set_num_threads(1)
