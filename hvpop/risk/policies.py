"""The context every evaluation of a loss runs in, so that it can be differentiated twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from .modules import ONE_THREAD


class TwiceDifferentiable(AbstractContextManager[None]):
    """What a forward pass needs so that any model's second derivative exists.

    - attention by its math kernel: the fused ones have no second derivative;
    - checkpoints run as plain calls: reentrant ones drop gradients silently, and recomputation
      would happen after the parameters have been put back;
    - compiled code run eagerly: AOT-compiled graphs have no double backward;
    - modules in the train or eval mode they had when the context was made, if it is given any.

    Reentrant: entered once around a whole product, it costs each evaluation next to nothing. One
    thread at a time is inside, since evaluations change modules and global flags for a while.
    Ops without a double backward are another context's work, see `hvpop.risk.rewrites`.
    """

    def __init__(self, modes: list[tuple[nn.Module, bool]] | None = None) -> None:
        self._modes = modes or []
        self._depth = 0

    def __enter__(self) -> None:
        ONE_THREAD.acquire()
        self._depth += 1
        if self._depth == 1:
            self._undo = ExitStack()
            self._set_modes()
            self._use_math_attention()
            self._run_checkpoints_plainly()
            if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
                self._undo.enter_context(torch.compiler.set_stance("force_eager"))

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._undo.close()
        ONE_THREAD.release()

    def _set_modes(self) -> None:
        for module, mode in self._modes:
            if module.training != mode:
                self._undo.callback(setattr, module, "training", module.training)
                module.training = mode

    def _use_math_attention(self) -> None:
        # As torch.nn.attention.sdpa_kernel(MATH) does, at a fifth of its cost.
        flags = torch.backends.cuda
        for enabled, enable, wanted in (
            (flags.flash_sdp_enabled(), flags.enable_flash_sdp, False),
            (flags.mem_efficient_sdp_enabled(), flags.enable_mem_efficient_sdp, False),
            (flags.cudnn_sdp_enabled(), flags.enable_cudnn_sdp, False),
            (flags.math_sdp_enabled(), flags.enable_math_sdp, True),
        ):
            if enabled != wanted:
                self._undo.callback(enable, enabled)
                enable(wanted)

    def _run_checkpoints_plainly(self) -> None:
        patches: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (checkpoint.CheckpointFunction, "apply", _call_reentrant),
            (checkpoint, "_checkpoint_without_reentrant_generator", _call_around),
        )
        for owner, name, replacement in patches:
            if name in vars(owner):
                self._undo.callback(setattr, owner, name, vars(owner)[name])
            else:  # inherited: it shows again once ours is gone
                self._undo.callback(delattr, owner, name)
            setattr(owner, name, replacement)


def _call_reentrant(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


def _call_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield  # torch calls the checkpointed function between the two steps of this generator
