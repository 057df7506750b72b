"""Recurrent layers without cuDNN, whose kernels for them have no second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _without_cudnn(op: Callable[..., Any]) -> Callable[..., Any]:
    def formula(*args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return op(*args, **kwargs)

    return formula


lstm = _without_cudnn(torch.lstm)
gru = _without_cudnn(torch.gru)
rnn_tanh = _without_cudnn(torch.rnn_tanh)
rnn_relu = _without_cudnn(torch.rnn_relu)
