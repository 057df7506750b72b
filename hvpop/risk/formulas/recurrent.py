"""Recurrent layers without cuDNN, whose kernels for them have no second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ...exchange import Exchange


class without_cudnn(Exchange):  # noqa: N801 (used like a function)
    """CuDNN off and nothing else: `torch.backends.cudnn.flags` would set the precision as well."""

    def _change(self) -> None:
        self._noted(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
        torch._C._set_cudnn_enabled(False)


class _without_onednn(Exchange):  # noqa: N801
    """In forward mode oneDNN's kernels for these have no derivative; torch's own have."""

    def _change(self) -> None:
        if forward_ad._current_level >= 0:
            self._noted(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)


def _rewritten(op: Callable[..., Any]) -> Callable[..., Any]:
    def formula(*args: Any, **kwargs: Any) -> Any:
        with without_cudnn(), _without_onednn():
            return op(*args, **kwargs)

    return formula


lstm = _rewritten(torch.lstm)
gru = _rewritten(torch.gru)
rnn_tanh = _rewritten(torch.rnn_tanh)
rnn_relu = _rewritten(torch.rnn_relu)
