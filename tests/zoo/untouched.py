"""What a user would notice: everything that a product must leave as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .registry import Problem


def leave_gradients(problem: Problem) -> None:
    """Give the first parameter a gradient, as a training loop leaves one; the others have none."""
    for i, p in enumerate(problem.parameters()):
        p.grad = torch.full_like(p, 0.25) if i == 0 else None


def seen_of_the_user(problem: Problem) -> dict[str, Any]:
    """Return all that a product must leave alone, by name, with tensors as copies."""
    seen: dict[str, Any] = {"random": random.getstate(), "numpy": np.random.get_state()}
    seen["torch"] = torch.get_rng_state()
    seen |= global_flags()
    roots = {"model": problem.model}
    if isinstance(problem.loss, nn.Module):
        roots["loss"] = problem.loss
    for root, top in roots.items():
        for path, module in top.named_modules(prefix=root, remove_duplicate=False):
            seen |= {f"{path}.{key}": value for key, value in seen_of_module(module).items()}
    seen["state_dict"] = list(problem.model.state_dict())
    for i, tensor in enumerate(tensors_in(problem.data)):
        seen[f"data.{i}"] = (tensor.detach().clone(), tensor.requires_grad, tensor.grad)
    return seen


def seen_of_module(module: nn.Module) -> dict[str, Any]:
    seen: dict[str, Any] = {"training": module.training}
    for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
        grad = None if p.grad is None else (id(p.grad), p.grad.clone())
        seen[name] = (p.detach().clone(), p.requires_grad, p._version, p.data_ptr(), grad)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        seen[name] = (buffer.detach().clone(), buffer.requires_grad, buffer.data_ptr())
    if isinstance(module, torch.jit.ScriptModule):
        return seen  # its parameters are new Python objects at each look
    seen["attributes"] = sorted(vars(module))
    seen["parameters"] = {name: id(p) for name, p in module._parameters.items()}
    seen["buffers"] = {name: id(buffer) for name, buffer in module._buffers.items()}
    seen["hooks"] = [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
    flat = getattr(module, "_flat_weights", None)
    seen["flat"] = None if flat is None else [id(weight) for weight in flat]
    return seen


def global_flags() -> dict[str, Any]:
    backends = torch.backends
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "flash": backends.cuda.flash_sdp_enabled(),
        "memory efficient": backends.cuda.mem_efficient_sdp_enabled(),
        "math": backends.cuda.math_sdp_enabled(),
        "fast path": backends.mha.get_fastpath_enabled(),
        "mkldnn": backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "checkpoint": torch.utils.checkpoint.CheckpointFunction.apply.__qualname__,
        "function modes": len(torch.overrides._get_current_function_mode_stack()),
    }


def tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for part in batch.values():
            yield from tensors_in(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from tensors_in(part)


def same(left: Any, right: Any) -> bool:
    """Say whether two records are equal, NaN equal to NaN."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and bits(left, right)
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def bits(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=0.0, atol=0.0, equal_nan=True)
