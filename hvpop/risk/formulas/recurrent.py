"""Recurrent layers without cuDNN, whose kernels for them have no second derivative, or by formulas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ... import _torch
from ...exchange import without_cudnn, without_onednn
from .lstm import lstm as formula


def _rewritten(op: Callable[..., Any]) -> Callable[..., Any]:
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        forward_mode = _torch.dual_depth() >= 0
        with without_cudnn(), without_onednn() if forward_mode else nullcontext():
            return op(*args, **kwargs)

    return rewritten


def lstm(*args: Any, **kwargs: Any) -> Any:
    result = formula(*args, **kwargs)
    return _torchs_lstm(*args, **kwargs) if result is None else result


_torchs_lstm = _rewritten(torch.lstm)
gru = _rewritten(torch.gru)
rnn_tanh = _rewritten(torch.rnn_tanh)
rnn_relu = _rewritten(torch.rnn_relu)
