"""Cases: models that are compiled, scripted, parallel, averaged, checkpointed, hooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .ingredients import mlp, regression
from .reference import finite_difference
from .registry import Problem, case


def wrapped(wrap: Callable[[nn.Sequential], nn.Module]) -> Problem:
    """Return a regression by the wrapped network, whose truth is that of the network itself."""
    model, data, loss = mlp(4, 5, 2), regression(4), nn.MSELoss()
    plain = Problem(model, data, loss)
    return Problem(wrap(model), data, loss, expected=lambda v: finite_difference(plain, v).product)


def compiled(model: nn.Module) -> nn.Module:
    """Compile by AOT autograd, which cannot be differentiated twice."""
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def inner_compiled(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(compiled(model[:2]), model[2])


def inner_compiled_in_place(model: nn.Sequential) -> nn.Module:
    model[0].compile(backend="aot_eager")
    return model


def distributed(model: nn.Module) -> nn.Module:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap as a machine without GPUs does; with one, the model would be moved there."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        return nn.DataParallel(model)


def hooked(model: nn.Sequential) -> nn.Module:
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[:] = [output.detach()]

    model[0].register_forward_hook(keep)
    return model


def backward_hooked(model: nn.Sequential) -> nn.Module:
    def watch(module: nn.Module, grad_in: Any, grad_out: Any) -> None:
        assert grad_out[0].shape[1] == 5

    model[1].register_full_backward_hook(watch)
    return model


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "compiled": compiled,
    "compiled_in_place": compiled_in_place,
    "compiled_submodule": inner_compiled,
    "compiled_submodule_in_place": inner_compiled_in_place,
    "data_parallel": data_parallel,
    "data_parallel_of_compiled": lambda model: data_parallel(compiled(model)),
    "distributed_data_parallel": distributed,
    "averaged_model": AveragedModel,
    "averaged_model_ema": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
    "forward_hook_that_keeps": hooked,
    "full_backward_hook": backward_hooked,
}
for _name, _wrap in WRAPPERS.items():
    case(_name)(lambda wrap=_wrap: wrapped(wrap))


class Changing(nn.Module):
    """Hooks that take part in the function: before, behind, and on a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(4, 5, 2)
        self.body[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
        self.body[2].register_forward_hook(lambda module, inputs, output: output.exp())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


case("hooks_that_change_the_function")(lambda: Problem(Changing(), regression(4), nn.MSELoss()))


@case("tensor_hook")
def tensor_hook() -> Problem:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(4, 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            if out.requires_grad:
                out.register_hook(lambda grad: None)
            return out

    return Problem(Watched(), regression(4), nn.MSELoss())


@case("gradient_reversal_hook", reference="double backward")
def gradient_reversal_hook() -> Problem:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(4, 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out + 0.5 * (out.sin() - out.sin().detach())  # the value keeps out alone

    return Problem(Scaled(), regression(4), nn.MSELoss())


# -- TorchScript ----------------------------------------------------------------------------------


def scripted(model: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(model)


def traced(model: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, torch.randn(3, 4))


SCRIPTS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "scripted": scripted,
    "traced": traced,
    "scripted_submodule": lambda model: nn.Sequential(scripted(model[:2]), model[2]),
}
for _name, _wrap in SCRIPTS.items():
    case(_name)(lambda wrap=_wrap: wrapped(wrap))


# -- checkpoints ----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A network whose hidden layers are computed again in the backward pass."""

    def __init__(self, hidden: nn.Module, **options: Any) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(4, 5), hidden, nn.Linear(5, 2)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.hidden, self.first(x), **self.options))


def hidden(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Tanh(), nn.Linear(5, 5), nn.Dropout(dropout), nn.SiLU())


for _reentrant in (True, False):
    _kind = "reentrant" if _reentrant else "non_reentrant"

    @case(f"checkpoint_{_kind}")
    def checkpointed(reentrant: bool = _reentrant) -> Problem:
        model = Checkpointed(hidden(), use_reentrant=reentrant)
        return Problem(model, regression(4), nn.MSELoss())

    @case(f"checkpoint_{_kind}_dropout", reference="laws")
    def checkpointed_dropout(reentrant: bool = _reentrant) -> Problem:
        model = Checkpointed(hidden(0.3), use_reentrant=reentrant)
        return Problem(model, regression(4), nn.MSELoss())

    @case(f"checkpoint_sequential_{_kind}")
    def checkpointed_sequence(reentrant: bool = _reentrant) -> Problem:
        class Segments(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(4, 5), *hidden(), nn.Linear(5, 2))

            def forward(self, x: Tensor) -> Tensor:
                x = x.clone().requires_grad_()
                return checkpoint_sequential(self.layers, 2, x, use_reentrant=reentrant)

        return Problem(Segments(), regression(4), nn.MSELoss())


@case("checkpoint_nested")
def checkpoint_nested() -> Problem:
    inner = Checkpointed(hidden(), use_reentrant=False)
    inner.first, inner.head = nn.Linear(5, 5), nn.Linear(5, 5)
    return Problem(Checkpointed(inner, use_reentrant=False), regression(4), nn.MSELoss())


@case("saved_tensors_on_cpu")
def saved_tensors_on_cpu() -> Problem:
    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(4, 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return self.body(x)

    return Problem(Offloaded(), regression(4), nn.MSELoss())
