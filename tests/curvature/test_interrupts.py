"""Ctrl-C at any moment leaves the process as it was."""

from __future__ import annotations

import random as python_random
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from hvpop import ForwardOverReverse, HessianOperator, _torch
from hvpop.exchange import ONE_THREAD

from .problems import random

ROUNDS = 150


def problem(way: str) -> tuple[nn.Module, Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3))
        net.append(nn.Linear(4, 1)).double()
    data = TensorDataset(random(16, 3), random(16, 1))
    loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(5))
    strategy = ForwardOverReverse() if way == "forward" else None
    H: Any = HessianOperator(net, nn.MSELoss(), loader, strategy=strategy)
    return net, loader, H.linearize(memory=0) if way == "linearized" else H


def seen(net: nn.Module, loader: Any) -> dict[str, Any]:
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    flags = torch.backends.cuda
    return {
        "tensors": {
            n: (id(t), t._version, t.detach().clone().tolist()) for n, t in tensors.items()
        },
        "modes": [m.training for m in net.modules()],
        "python": python_random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        "torch": torch.get_rng_state().tolist(),
        "generator": loader.generator.get_state().tolist(),
        "function modes": torch._C._len_torch_function_stack(),
        "grad": torch.is_grad_enabled(),
        "attention": (flags.flash_sdp_enabled(), flags.math_sdp_enabled()),
        "checkpoints": "apply" in vars(checkpoint.CheckpointFunction),
        "functions": vars(torch.autograd.Function)["apply"] is _torch.function_apply,
        "level": forward_ad._current_level,
        "lock": ONE_THREAD._is_owned(),  # type: ignore[attr-defined]
    }


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
@pytest.mark.parametrize("way", ["live", "linearized", "forward"])
def test_an_interrupt_at_any_moment_leaves_everything_as_it_was(way: str) -> None:
    net, loader, H = problem(way)
    v = random(H.shape[1])
    expected = H @ v
    start = time.perf_counter()
    assert torch.equal(H @ v, expected)
    length = time.perf_counter() - start
    before = seen(net, loader)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    moments = python_random.Random(0)
    interrupted = 0
    try:
        for _ in range(ROUNDS):
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 1.1 * length))
                H @ v
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, RuntimeError) as error:
                interrupted += "KeyboardInterrupt" in repr(
                    error
                )  # TorchScript makes errors of them
            signal.setitimer(signal.ITIMER_REAL, 0)
            after = seen(net, loader)
            assert [name for name in before if before[name] != after[name]] == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted > ROUNDS // 10
    assert torch.equal(H @ v, expected)
