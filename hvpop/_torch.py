"""What hvpop takes of torch that is private or young: each name once, what it is for, since when.

A name that torch does not have is an error when hvpop is imported, or has something that serves in
its place here. One that it has and no longer calls is found out by `hvpop.risk.canaries`.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Hashable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec

OLDEST, NEWEST = "2.6", "2.15"
"""The releases that the suite is run on, see docs/versions.md."""


def content(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, shared; the view keeps the tensor.

    `Tensor.numpy` would share them, too, but no storage that it was called on is ever resized again: FSDP
    resizes those of parameters, and a tensor of the user's is to stay what it was.
    """
    held: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    held.tensor = tensor
    return memoryview(held).cast("B")


def _private(path: str, purpose: str) -> Any:
    """What is found at a dotted path of torch's, which `purpose` cannot do without."""
    owner, _, name = path.rpartition(".")
    try:
        return getattr(_found(owner), name)
    except (AttributeError, ImportError):
        raise ImportError(_gone(path, purpose)) from None


def _found(path: str) -> Any:
    try:
        return import_module(path)
    except ImportError:
        owner, _, name = path.rpartition(".")
        return getattr(_found(owner), name)


def _gone(path: str, purpose: str) -> str:
    return (
        f"hvpop needs {path} {purpose}; torch {torch.__version__} has nothing of that name: install "
        f"a torch from {OLDEST} to {NEWEST}, or a newer hvpop"
    )


@cache
def say_if_newer() -> None:
    """Tell once that nobody has run the suite on the torch at hand."""
    if _release(torch.__version__) > _release(NEWEST):
        warnings.warn(
            f"torch {torch.__version__} is newer than {NEWEST}, the last release that hvpop has been "
            "tested on. What it relies on is tried out as it is needed; H.check() tells more",
            stacklevel=2,
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


# --- modes and levels that an interrupt can leave behind (all since 2.0) ---------------------------

_LEAVING = "to leave what an interrupted product has entered"

function_modes = _private("torch._C._len_torch_function_stack", _LEAVING)
function_mode_at = _private("torch._C._get_function_stack_at", "to see whether a mode is active")
pop_function_mode = _private("torch._C._pop_torch_function_stack", _LEAVING)
dispatch_modes = _private("torch._C._len_torch_dispatch_stack", _LEAVING)
pop_dispatch_mode = _private("torch._C._pop_torch_dispatch_stack", _LEAVING)

_SAVED = "to measure what a graph keeps"
push_saved_tensors_hooks = _private("torch._C._autograd._push_saved_tensors_default_hooks", _SAVED)
pop_saved_tensors_hooks = _private("torch._C._autograd._pop_saved_tensors_default_hooks", _SAVED)


PROBE = torch.zeros(1, requires_grad=True)
"""Saved to see by which hooks; torch can tell what is on top only since 2.8."""


def saved_by(node: Any) -> list[Tensor]:
    """The tensors that autograd saved in a node of a graph: attributes named after them (since 1.9)."""
    if isinstance(node, BackwardCFunction):
        saved = [*node.saved_tensors, *vars(node).values()]
    else:
        kind: Hashable = node.__class__
        names = _saved_names(kind)
        if names is None:
            raise LookupError(f"{type(node).__name__} does not show what it keeps")
        saved = [getattr(node, name) for name in names]
    lists = [s if isinstance(s, tuple | list) else (s,) for s in saved]
    return [t for some in lists for t in some if isinstance(t, Tensor)]


@cache
def _saved_names(kind: Hashable) -> list[str] | None:
    """None if tensors may be saved that no attribute shows."""
    if getattr(kind, "__name__", "") in ("CopySlices", "CppFunction"):
        return None
    return [n.removeprefix("_raw") for n in dir(kind) if n.startswith("_raw_saved_")]


exit_dual_level = _private("torch._C._exit_dual_level", _LEAVING)
_private("torch.autograd.forward_ad._current_level", _LEAVING)


def dual_depth() -> int:
    """The level of forward mode: -1 outside of all."""
    return int(forward_ad._current_level)


def set_dual_depth(level: int) -> None:
    """What torch counts in Python, beside its core."""
    forward_ad._current_level = level


# --- switches ----------------------------------------------------------------------------------

_KERNELS = "to take kernels that have a second derivative (torch.backends' switches can be frozen)"
set_grad_enabled = _private(
    "torch._C._set_grad_enabled", "to switch gradients on, and see them off"
)
set_fwd_grad_enabled = _private(
    "torch._C._set_fwd_grad_enabled", "to stop tangents under torch.no_grad(), which lets them pass"
)
cudnn_enabled = _private("torch._C._get_cudnn_enabled", _KERNELS)
set_cudnn_enabled = _private("torch._C._set_cudnn_enabled", _KERNELS)
onednn_enabled = _private("torch._C._get_mkldnn_enabled", _KERNELS)
set_onednn_enabled = _private("torch._C._set_mkldnn_enabled", _KERNELS)
tracing_state = _private("torch._C._get_tracing_state", "to leave ops alone under torch.jit.trace")


def compiled_code() -> tuple[Any, Any] | None:
    """What torch does with compiled code now, and the function that sets it; None: nothing can be compiled.

    `torch.compiler.set_stance` (since 2.6) sets it when it is made, so that an interrupt can fall
    between the change and any note of it.
    """
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return None
    where = import_module("torch._dynamo.eval_frame")
    try:
        return where._stance, where._set_stance
    except AttributeError:
        raise ImportError(_gone("torch._dynamo.eval_frame._set_stance", _EAGERLY)) from None


_EAGERLY = "to run compiled code eagerly, since it has no double backward"


engine = _private(
    "torch.autograd.graph._engine_run_backward",
    "to tell a derivative of torch's that fails, and to take one without looking at shapes",
)


will_run = _private(
    "torch._C._will_engine_execute_node",
    "to leave out derivatives that a pass does not ask for (since 2.1)",
)


def uses_tensor_cores() -> bool:
    """Whether float32 on a GPU is rounded to 10 bits somewhere: each kind of op says since 2.9."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        users = backends.cudnn.conv, backends.cuda.matmul
        return any(user.fp32_precision == "tf32" for user in users)
    return bool(backends.cudnn.allow_tf32 or backends.cuda.matmul.allow_tf32)


transforms = _private(
    "torch._C._functorch.peek_interpreter_stack", "to try nothing out within torch.func"
)


# --- young names: what they are for, and what serves without --------------------------------------------

foreach_add_ = _private("torch._foreach_add_", "to add a batch's product in one call (since 1.9)")
foreach_add = _private("torch._foreach_add", "to begin a sum in one call (since 1.9)")
foreach_mul_ = _private("torch._foreach_mul_", "to divide by the weights in one call (since 1.9)")
foreach_mul = _private("torch._foreach_mul", "to weigh a batch's product in one call (since 1.9)")


def make_fx() -> Any:
    """The tracer of `Compiled` (since 2.0). Without it the strategy that is wrapped serves, with this reason."""
    return _private("torch.fx.experimental.proxy_tensor.make_fx", "to trace products")


def inductor_compile() -> Any:
    """TorchInductor on a graph (since 2.0). Without it the traced graph serves, operation by operation."""
    return _private("torch._inductor.compile", "to compile traced products")


def synchronize(device: torch.device) -> None:
    """Wait for a device (`torch.accelerator`, since 2.6); the host waits by itself."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def missing(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("stands for what this torch does not have")


linear_cross_entropy: Any = getattr(torch.nn.functional, "linear_cross_entropy", missing)
"""Since 2.13, with a wrong second derivative in chunks. (What is `missing` nobody calls.)"""


def structure(spec: TreeSpec) -> Hashable:
    """The structure of a pytree as a key; torch makes one of it since 2.7."""
    try:
        hash(spec)
    except TypeError:
        context = tuple(spec.context) if isinstance(spec.context, list) else spec.context
        return spec.type, context, tuple(structure(child) for child in spec.children_specs)
    return spec


# --- what is replaced while a model is evaluated -----------------------------------------------------

checkpoint = import_module("torch.utils.checkpoint")

CHECKPOINTS = tuple(
    name
    for name in (
        "_checkpoint_without_reentrant_generator",  # 2.1 to 2.13 call it, and later keep it
        "_checkpoint_without_reentrant_generator_impl",  # since 2.14.1
    )
    if hasattr(checkpoint, name)
)
"""The generators, each around the call of a function that is to be evaluated again in backward."""

function_apply: Any = vars(torch.autograd.Function)["apply"]
"""A classmethod of Python's; since 2.14 one of C's, which a patch of the class does not reach once it is looked up."""


def function_of(node: Any) -> Any:
    """The class that its author wrote, of the node of a custom Function."""
    try:
        return node._forward_cls
    except AttributeError:
        raise RuntimeError(_gone(f"{type(node).__name__}._forward_cls", _ONCE)) from None


_ONCE = "to see whether a custom Function is once_differentiable"

backward_apply = _private(
    "torch.autograd.function.BackwardCFunction.apply", "to see a custom Function go backward"
)

saved_tensors_enter: Any = vars(saved_tensors_hooks)["__enter__"]

functorch_utils = import_module("torch._functorch.utils")
unwrap_dead_wrappers: Any = getattr(functorch_utils, "unwrap_dead_wrappers", None)
"""Called by `Function.apply` until 2.13, with all of its arguments."""

eager_transforms = import_module("torch._functorch.eager_transforms")
wrap_for_grad: Any = getattr(eager_transforms, "_wrap_for_grad", None)
"""Called by `torch.func.grad` with what it differentiates by."""


# --- several processes -------------------------------------------------------------------------------


def default_store() -> Any:
    """The store that torch.distributed was initialized with (since 1.0); it has no public getter."""
    name = "torch.distributed.distributed_c10d._get_default_store"
    return _private(name, "to let processes leave words for each other")()


def host_threads_of(group: Any) -> Any:
    """What holds a process group's threads on the host; None if it has none, or in another release.

    Whoever lets go of it last waits for them, without the lock of the interpreter, which they may be
    waiting for; a group that did so itself would keep the lock in torch 2.6.
    """
    try:
        return group._get_backend(torch.device("cpu"))
    except (AttributeError, RuntimeError):
        return None


def _is_a(thing: Any, name: str) -> bool:
    """Whether it is of a class of torch.distributed, which takes seconds to import."""
    return any(
        kind.__name__ == name and kind.__module__.startswith("torch.distributed")
        for kind in type(thing).__mro__
    )


def is_fsdp2(module: Any) -> bool:
    """Whether `fully_shard` was called on a module (since 2.6)."""
    return _is_a(module, "FSDPModule")


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return _is_a(tensor, "DTensor")


def distributed_tensor(whole: torch.Tensor, mesh: Any, placements: Any) -> torch.Tensor:
    """A DTensor of a tensor that all processes have (since 2.5)."""
    from torch.distributed.tensor import distribute_tensor

    found: torch.Tensor = distribute_tensor(whole, mesh, placements)
    return found


def resharding(module: Any) -> list[dict[str, Any]]:
    """The switches of an FSDP2 module, of which torch has setters alone."""
    return [
        {name: vars(part)[name] for name in _SWITCHES if name in vars(part)}
        for part in _fsdp_parts(module)
    ]


def set_resharding(module: Any, switches: list[dict[str, Any]]) -> None:
    """The switches as they were."""
    for part, values in zip(_fsdp_parts(module), switches, strict=True):
        vars(part).update(values)


_DIVISORS = ("gradient_divide_factor", "reduce_scatter_reduce_op")
"""Of gradients, if not by the number of processes: the second is the first in 2.6."""

_SWITCHES = (
    "_auto_reshard_after_forward",
    "post_forward_mesh_info",
    "reshard_after_backward",
    "reduce_grads",
    "all_reduce_grads",
    *_DIVISORS,
)


def divide_by_processes(module: Any) -> None:
    """Let gradients be averages over processes, whatever the user divides them by."""
    for part in _fsdp_parts(module):
        vars(part).update({name: None for name in _DIVISORS if name in vars(part)})


def halves(module: Any) -> bool:
    """Whether an FSDP2 module computes or reduces in half precision."""
    policies = [getattr(part, "mp_policy", None) for part in _fsdp_parts(module)]
    kinds = [getattr(p, name, None) for p in policies for name in ("param_dtype", "reduce_dtype")]
    return any(kind is not None and torch.finfo(kind).bits < 32 for kind in kinds)


def _fsdp_parts(module: Any) -> list[Any]:
    try:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # several since 2.12
        if groups is None:
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    except AttributeError:
        raise ImportError(_gone("the state of FSDPModule", "to leave it as it was")) from None
    return [state, *groups]


def leads() -> bool:
    """Whether this process speaks for all that there are: rank 0, or the only one."""
    distributed: Any = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return not ready or distributed.get_rank() == 0


def all_gather() -> Any:
    """Gathers tensors into one: of a new name since 2.13, which warns of the old one."""
    distributed: Any = torch.distributed
    new = getattr(distributed, "all_gather_single", None)
    return new or distributed.all_gather_into_tensor
