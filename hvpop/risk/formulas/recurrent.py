"""Recurrent layers without cuDNN, whose kernels for them have no second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_cudnn() -> Iterator[None]:
    """CuDNN off and nothing else: `torch.backends.cudnn.flags` would set the precision as well."""
    enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(enabled)


def _rewritten(op: Callable[..., Any]) -> Callable[..., Any]:
    def formula(*args: Any, **kwargs: Any) -> Any:
        with without_cudnn():
            return op(*args, **kwargs)

    return formula


lstm = _rewritten(torch.lstm)
gru = _rewritten(torch.gru)
rnn_tanh = _rewritten(torch.rnn_tanh)
rnn_relu = _rewritten(torch.rnn_relu)
