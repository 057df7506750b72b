"""Problems made of torch's own databases: an op or a layer, its sample inputs as parameters, a smooth loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Call = Callable[..., Any]


@dataclass
class Problem:
    """A module whose forward pass is one call and a smooth number made of its results."""

    name: str
    variant: str
    sample: int
    module: nn.Module


class Called(nn.Module):
    """The differentiable inputs of a call as parameters; its result as one number.

    Two terms couple all entries of the results, so that no second derivative is missed.
    """

    def __init__(self, call: Call, inputs: tuple[Any, Any], *, in_place: bool = False) -> None:
        super().__init__()
        self.call, self.in_place = call, in_place
        leaves, self.structure = pytree.tree_flatten(inputs)
        self.given = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        chosen = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        self.places = dict.fromkeys(chosen)
        self.inputs = nn.ParameterList([nn.Parameter(leaves[i].detach().clone()) for i in chosen])

    def forward(self, _: Tensor) -> Tensor:
        torch.manual_seed(0)
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in self.given]
        for place, tensor in zip(self.places, self.inputs, strict=True):
            leaves[place] = tensor * 1 if self.in_place else tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return number(self.call(*args, **kwargs))


def number(results: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, result in enumerate(pytree.tree_leaves(results)):
        if isinstance(result, Tensor) and result.requires_grad:
            y = result.to_dense() if result.layout is not torch.strided else result
            y = torch.view_as_real(y) if y.is_complex() else y
            if y.numel():
                generator = torch.Generator().manual_seed(i)
                weights = torch.randn(y.shape, dtype=torch.float64, generator=generator)
                finite = y.double().masked_fill(~y.isfinite(), 0)
                total = total + (weights * finite).sum() * (1 + 0.1 * finite.mean())
    return total


COARSE = ("bfloat16", "half", "float", "chalf", "cfloat")
"""Ops that round: steps, whose differences tell nothing."""


def ops() -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    exact = [op for op in op_db if op.supports_autograd and op.name not in COARSE]
    return [op for op in exact if torch.float64 in op.supported_dtypes("cpu")]


def of_op(op: Any, most: int) -> Iterator[Problem]:
    """Some samples of an op, and one of each other spelling: methods, in place, aliases."""
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    step = max(len(samples) / most, 1)
    for i in range(min(most, len(samples))):
        place = int(i * step)
        yield _problem(op, "", op.op, samples[place], place)
    several = next((s for s in samples if _count(s) >= 4), samples[0])
    for words, place_at in POINTS.items():
        problem = _problem(
            op, words, op.op, several, next(i for i, s in enumerate(samples) if s is several)
        )
        with torch.no_grad():
            for tensor in problem.module.parameters():
                place_at(tensor.view(-1))
        yield problem
    for spelling in (op, *op.aliases):
        for kind in ("op", "method_variant", "inplace_variant"):
            variant = getattr(spelling, kind)
            if variant is not None and variant is not op.op:
                words = f"{spelling.name} {kind.removesuffix('_variant')}"
                yield _problem(op, words, variant, samples[0], 0, in_place="inplace" in kind)


POINTS: dict[str, Callable[[Tensor], object]] = {
    "zeros": lambda x: x[::2].zero_(),
    "all zero": lambda x: x.zero_(),
    "ties": lambda x: x.copy_(x[:1].expand_as(x)),
    "pairs": lambda x: x[1::2].copy_(x[: x.numel() - 1 : 2]),
}
"""Points at which formulas of derivatives have quotients of zeros, put into the first sample."""


def _count(sample: Any) -> int:
    tensors = pytree.tree_leaves(((sample.input, *sample.args), sample.kwargs))
    return sum(t.numel() for t in tensors if isinstance(t, Tensor) and t.requires_grad)


def _problem(
    op: Any, variant: str, function: Call, sample: Any, place: int, *, in_place: bool = False
) -> Problem:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        result = op.gradcheck_wrapper(function, x, *args, **kwargs)
        return sample.output_process_fn_grad(result)

    inputs = ((sample.input, *sample.args), sample.kwargs)
    module = Called(call, inputs, in_place=in_place)
    return Problem(op.formatted_name, variant, place, module)


def layers() -> list[Any]:
    from torch.testing._internal.common_modules import module_db

    return [info for info in module_db if torch.float64 in info.supported_dtypes("cpu")]


def of_layer(info: Any, most: int) -> Iterator[Problem]:
    """Some samples of a layer, in train and in eval mode where it tells them apart."""
    for training in (True, False) if info.train_and_eval_differ else (True,):
        samples = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
        )
        step = max(len(samples) / most, 1)
        for i in range(min(most, len(samples))):
            place = int(i * step)
            made, given = samples[place].constructor_input, samples[place].forward_input
            if given is None:
                continue
            if "dtype" in inspect.signature(info.module_cls).parameters:
                made.kwargs.setdefault("dtype", torch.float64)
            torch.manual_seed(0)
            layer = info.module_cls(*made.args, **made.kwargs).double().train(training)
            module = Called(layer, (given.args, given.kwargs))
            yield Problem(info.name, "train" if training else "eval", place, module)


def parameters_of(problem: Problem) -> Sequence[nn.Parameter]:
    return [p for p in problem.module.parameters() if p.requires_grad and p.numel()]
