"""The context every evaluation of a loss runs in, so that it can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from .. import _torch
from ..exchange import Exchange
from ..interception import Reentered, stood_in


class _Patches(Exchange):
    def _patch(self, owner: Any, name: str, replacement: Any) -> None:
        if name in vars(owner):
            self._noted(setattr, owner, name, vars(owner)[name])
        else:  # inherited: it shows again once ours is gone
            self._noted(_delete, owner, name)
        setattr(owner, name, replacement)


def _delete(owner: Any, name: str) -> None:
    if name in vars(owner):
        delattr(owner, name)


class TwiceDifferentiable(_Patches):
    """What a forward pass, and the backward passes after it, need so that second derivatives exist.

    - attention by its math kernel: the fused ones have no second derivative;
    - checkpoints run as plain calls: reentrant ones drop gradients silently;
    - compiled code run eagerly: AOT-compiled graphs have no double backward.

    One inside another does nothing. Ops without a double backward are another context's work, see
    `hvpop.risk.rewrites`.
    """

    active = False

    def _change(self) -> None:
        if TwiceDifferentiable.active:
            return
        self._set(TwiceDifferentiable, "active", True)
        self._use_math_attention()
        self._run_checkpoints_plainly()
        compiled = _torch.compiled_code()
        if compiled is not None:
            stance, set_stance = compiled
            self._noted(set_stance, stance)
            torch.compiler.set_stance("force_eager")

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
                self._noted(enable, enabled)
                enable(wanted)

    def _run_checkpoints_plainly(self) -> None:
        self._patch(checkpoint.CheckpointFunction, "apply", _call_reentrant)
        for name in _torch.CHECKPOINTS:
            self._patch(checkpoint, name, _call_around)


def _call_reentrant(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


def _call_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield  # torch calls the checkpointed function between the two steps of this generator


# --- custom Functions ---------------------------------------------------------------------------


class FunctionsWatched(_Patches):
    """Custom Functions see stand-ins, too, and evaluate the model as the forward pass does.

    One inside another does nothing.
    """

    active = False

    def _change(self) -> None:
        if not FunctionsWatched.active:
            self._set(FunctionsWatched, "active", True)
            self._patch(torch.autograd.Function, "apply", classmethod(_apply))
            if _torch.unwrap_dead_wrappers is not None:
                self._patch(_torch.functorch_utils, "unwrap_dead_wrappers", _unwrapped)
            if _torch.wrap_for_grad is not None:
                self._patch(_torch.eager_transforms, "_wrap_for_grad", _wrapped)
            self._patch(BackwardCFunction, "apply", _backward)
            self._patch(saved_tensors_hooks, "__enter__", _saving)


def _apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    return _torch.function_apply.__get__(None, cls)(*stood_in(args), **kwargs)


def _unwrapped(args: tuple[Any, ...]) -> Any:
    """Part of ``apply``, also of one that was looked up before it was patched."""
    return _torch.unwrap_dead_wrappers(stood_in(args))


def _wrapped(tensor: Any, level: int) -> Any:
    """What `torch.func` differentiates by it hides from every mode."""
    return _torch.wrap_for_grad(*stood_in((tensor,)), level)


def _backward(ctx: Any, *args: Any) -> Any:
    """A Function's backward may evaluate the model again, and then as the forward pass did."""
    with Reentered():
        return _torch.backward_apply(ctx, *args)


hooks: set[Any] = set()
"""What an evaluation has put on tensors, or on what autograd saves of them."""


def _saving(self: Any) -> Any:
    """What is saved by hooks may be evaluated again when it is asked for, as in checkpoints."""
    hooks.add(type(self))
    return _torch.saved_tensors_enter(self)


def _hooked(tensor: Tensor, hook: Callable[..., Any]) -> Any:
    """A hook may do so, too."""
    hooks.add(hook)

    def reentering(gradient: Tensor) -> Any:
        with Reentered():
            return hook(gradient)

    return tensor.register_hook(reentering)


WATCHED = {torch.Tensor.register_hook: _hooked}
"""A table for `hvpop.interception`."""
