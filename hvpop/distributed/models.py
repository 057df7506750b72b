"""The Hessian of a model whose parameters are held in parts, where no process has all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..curvature.space import layout_of
from ..exchange import Exchange, Ungraded, guarded
from ..operators import Layout, LinearOperator, Space
from ..risk import EmpiricalRisk
from ..risk.batches import NoDataError
from ..risk.losses import rule_of, scalar
from ..risk.policies import TwiceDifferentiable
from ..risk.randomness import private_rng
from ..strategies import FiniteDifference, HVPStrategy, ReverseOverReverse
from ..strategies.base import grad_enabled
from ..strategies.rounding import rounding
from .errors import RemoteError, words
from .team import Team, init

Parts = dict[str, Tensor]


class ShardedModelHessian(LinearOperator):
    """The Hessian of a model sharded by ``fully_shard``, or tensor parallel, as it is: nothing is gathered.

    Every process makes it, and multiplies the same vectors, or has them in parts (`Sharded`); the model
    gathers and reduces itself, as in a training step. Under FSDP2 each process has its own shard of the
    data, with any number of batches; without it all read the same.

    Parameters
    ----------
    risk : EmpiricalRisk
        Model, loss and data of this process. The loss says what it divides by, as torch's do, or
        ``average=Average(weight=...)``.
    strategy : FiniteDifference or ReverseOverReverse
        `FiniteDifference` moves the parameters and puts them back: four gradients a product, whose
        relative error is measured. `ReverseOverReverse` is for tensor parallel models that stand the
        comparison with it, parameter by parameter: at the first product, and after a change of settings.
    team : Team, optional
        That of `init` by default.

    Attributes
    ----------
    error : float or None
        Relative error of the last product, the largest of its columns, as far as differences with two
        steps tell; None before, and of exact ones.

    Raises
    ------
    TypeError
        For another strategy, for exact ones under FSDP2, for parameters of which torch's exact second
        derivatives are not what differences of gradients say, and for half precision.
    ValueError
        For a loss that does not say what it divides by, and a model spread over some processes only.
    FloatingPointError
        On all processes, for a product that is not finite.

    Warns
    -----
    UserWarning
        Once, on rank 0, if the error of a product is more than a hundredth.

    Notes
    -----
    Under FSDP2 exact products come of ``with gathered(model):``, where a whole model fits. A process that
    fails within the model leaves the others in the model's own collectives, until their timeout.
    Memory beside the model: five times the parts held here, and four times the largest parameter.
    Divisors of gradients that the user has set are put aside meanwhile.
    Central differences are taken with two steps, h and 2 h, and extrapolated (Richardson, 1911). Their
    distance tells the error: where rounding prevails that of the result is 1.2 times it, where
    truncation does it is far less.

    Examples
    --------
    >>> import torch
    >>> from hvpop import EmpiricalRisk
    >>> from hvpop.distributed import ShardedModelHessian
    >>> from hvpop.strategies import FiniteDifference
    >>> model = torch.nn.Linear(2, 1, bias=False).double()  # whole, for once
    >>> data = [(torch.eye(2).double(), torch.zeros(2, 1).double())]
    >>> H = ShardedModelHessian(EmpiricalRisk(model, torch.nn.MSELoss(), data), FiniteDifference())
    >>> (H @ torch.tensor([1.0, 2.0]).double()).round(decimals=6)
    tensor([1., 2.], dtype=torch.float64)
    """

    _fresh = True

    def __init__(
        self, risk: EmpiricalRisk, strategy: HVPStrategy, team: Team | None = None
    ) -> None:
        if not isinstance(risk, EmpiricalRisk):
            raise TypeError(
                f"ShardedModelHessian expects an EmpiricalRisk(model, loss, data), got {risk!r}"
            )
        if type(strategy) not in (FiniteDifference, ReverseOverReverse):
            raise TypeError(
                "ShardedModelHessian expects strategy FiniteDifference() or ReverseOverReverse(), got "
                f"{strategy!r}"
            )
        self._fsdp: list[Any] = [m for m in risk.model.modules() if _torch.is_fsdp2(m)]
        if self._fsdp and not isinstance(strategy, FiniteDifference):
            raise TypeError(
                "ShardedModelHessian: parameters sharded by FSDP2 have no exact second derivatives in "
                "torch; take them whole, `with hvpop.distributed.gathered(model):`, or pass "
                "FiniteDifference() for differences of gradients"
            )
        if any(map(_torch.halves, self._fsdp)):
            raise TypeError(
                "ShardedModelHessian: differences of gradients in half precision are rounding; call "
                "fully_shard without a MixedPrecisionPolicy in half precision"
            )
        for part in self._fsdp:
            part.reshard()
        self.team = init() if team is None else team
        point = risk.parameters()
        for name, p in point.items():
            known: Any = p
            if torch.finfo(p.dtype).bits < 32:
                raise TypeError(
                    f"ShardedModelHessian needs float32 or float64 parameters, got {name} in {p.dtype}"
                )
            if self._fsdp and not _torch.is_distributed(p):
                raise TypeError(
                    f"ShardedModelHessian: {name} is no part of what fully_shard was called on, and its "
                    "gradient would be that of one process; leave it out by params="
                )
            if _torch.is_distributed(p) and known.device_mesh.size() != self.team.size:
                raise ValueError(
                    f"ShardedModelHessian: {name} is spread over {known.device_mesh.size()} of "
                    f"{self.team.size} processes, whose parts would be averaged with others'; shard "
                    "the model over all processes of the team"
                )
        rule = risk.average.weight or rule_of(risk.batch_loss, risk.model)
        if rule is None:
            raise ValueError(
                "ShardedModelHessian: the loss does not say what it divides by; pass it as "
                "torch.nn.CrossEntropyLoss(...), or average=Average(weight=...) with a function that "
                "returns the divisor of a batch"
            )
        self._weight: Callable[[Any], float] = rule
        self.risk, self.strategy = risk, strategy
        self._layout = layout_of(point)
        n = self._layout.size
        first = next(iter(point.values()))
        super().__init__((n, n), dtype=first.dtype, device=first.device, symmetric=True)
        self._proven: Any = None  # the settings of the model for which exact products have been
        self.error: float | None = None
        self._largest = 0.0  # error so far
        self._spare: Any = None  # a batch, run for nothing where others have more

    @property
    def layout(self) -> Layout:
        return self._layout

    # -- products ---------------------------------------------------------------------------------

    def _apply(self, V: Tensor) -> Tensor:
        return self.multiply(V, Space.of(V))

    def multiply(self, V: Tensor, space: Space) -> Tensor:
        """The products with vectors as ``space`` holds them, of which one parameter's rows at a time are whole."""
        if not isinstance(self.strategy, FiniteDifference):
            guarded(self._prove)
        self.error = None
        Y = torch.empty_like(V)
        for x, y in zip(V.T.split(1), Y.T.split(1), strict=True):
            v = {
                name: _like(space.rows(x.T, start, stop).reshape(p.shape), p)
                for (start, stop), (name, p) in self._pieces()
            }
            result = guarded(partial(self._product, v))
            if not isfinite(_norm(result)):  # of all parts: the same on all processes
                raise FloatingPointError(
                    f"{self!r}: a product is not finite; look for non-finite entries in the model and "
                    "the data of each process"
                )
            for (start, _), (name, _) in self._pieces():
                space.put(y.T, start, _whole(result.pop(name)).reshape(-1, 1))
        return Y

    def _pieces(self) -> Iterator[tuple[tuple[int, int], tuple[str, Tensor]]]:
        start = 0
        for name, p in self.risk.parameters().items():
            yield (start, start + p.numel()), (name, p)
            start += p.numel()

    def _product(self, v: Parts) -> Parts:
        if not isinstance(self.strategy, FiniteDifference):
            return self._exact(v)
        result, error = self._difference(v)
        size = _norm(result)
        self.error = max(self.error or 0.0, error / size if size else 0.0)
        if self.error > _MUCH >= self._largest:
            self.team.warn(
                UserWarning,
                f"{self!r}: differences of gradients with two steps are {self.error:.0%} apart, as where the "
                "model has kinks (ReLU) or few digits; take float64, a smaller FiniteDifference(step=...), or "
                "a whole copy of the model; `error` says how far products are off",
            )
        self._largest = max(self._largest, self.error)
        return result

    def _difference(self, v: Parts) -> tuple[Parts, float]:
        """The product, and by how much it may be off."""
        point = self.risk.parameters()
        length = _norm(v)
        if length == 0:
            return {name: torch.zeros_like(p) for name, p in point.items()}, 0.0
        step: float = getattr(self.strategy, "step", None) or rounding(point.values()) ** (1 / 3)
        h = step * max(_norm(point), 1.0) / length
        moved = _Moved(point)
        with moved, _Trained(self._fsdp):
            near, far = (self._quotient(moved, v, t) for t in (h, 2 * h))
        apart = {name: near[name] - t for name, t in far.items()}
        del far
        for name, t in near.items():
            t += apart[name] / 3
        return near, _UNSURE * _norm(apart)

    def _quotient(self, moved: _Moved, v: Parts, h: float) -> Parts:
        point = self.risk.parameters()
        moved.by(v, h)
        ahead = self._gradient(point)
        moved.by(v, -h)
        for name, t in self._gradient(point).items():
            ahead[name] -= t
            ahead[name] /= 2 * h
        return ahead

    def _gradient(self, point: Parts) -> Parts:
        """That of the average over the batches of all processes, by ``backward()``."""
        share = self._copies()
        with Ungraded(point.values()), grad_enabled():
            total = 0.0
            for batch, weight, seed in self._steps():
                total += weight * share
                with private_rng(seed), _Buffers(self.risk):
                    (self._loss(batch) * (weight * self._averaging())).backward()
            total = self._total(total)
            return {
                n: torch.zeros_like(p) if p.grad is None else _placed(p.grad, p).div_(total)
                for n, p in point.items()  # which lose them at the end
            }

    def _exact(self, v: Parts) -> Parts:
        """Reverse over reverse, through whatever the model does between processes."""
        point = self.risk.parameters()
        total, weights = {n: torch.zeros_like(p.detach()) for n, p in point.items()}, 0.0
        leaves = list(point.values())
        with TwiceDifferentiable(), grad_enabled():
            for batch, weight, seed in self._steps():
                weights += weight * self._copies()
                with private_rng(seed), _Buffers(self.risk):
                    first = torch.autograd.grad(
                        self._loss(batch), leaves, create_graph=True, allow_unused=True
                    )
                    pairs = [
                        (g, v[n])
                        for n, g in zip(point, first, strict=True)
                        if g is not None and g.requires_grad
                    ]
                    second = torch.autograd.grad(
                        [g for g, _ in pairs],
                        leaves,
                        [_placed(t, g) for g, t in pairs],
                        allow_unused=True,
                    )
                for (n, p), t in zip(point.items(), second, strict=True):
                    if t is not None:
                        total[n] += weight * _placed(t.detach(), p)
        weights = self._total(weights)
        return {n: t / weights for n, t in total.items()}

    def _loss(self, batch: Any) -> Tensor:
        return scalar(self.risk.batch_loss(self.risk.model, batch))

    def _averaging(self) -> int:
        """By how many processes the model divides what their gradients add up to."""
        return self.team.size if self._fsdp else 1

    def _copies(self) -> float:
        return 1.0 if self._fsdp else 1 / self.team.size

    def _total(self, weight: float) -> float:
        if not self.risk.average.normalized:
            return 1.0
        return float(
            self.team.add_up(torch.tensor([weight], dtype=torch.float64, device=self.device))
        )

    # -- data -------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[tuple[Any, float, int]]:
        """Batches with weights and seeds: as many on all processes, since the model waits for each."""
        batches, team, count = self.risk.read(), self.team, 0
        while True:
            batch, weight, failed = None, 0.0, None
            cause: BaseException | None = None
            try:
                while weight == 0:
                    batch = next(batches)[1]
                    weight = float(self._weight(batch))
            except (StopIteration, NoDataError):
                batch = None
            except BaseException as error:
                failed, cause = words(error), error
            said = team.everyone((batch is not None, self._spare is None, weight, failed))
            for rank, one in enumerate(said):
                if one[3] is not None:
                    raise RemoteError(rank, f"rank {rank} of {team.size}: {one[3]}") from cause
            if not any(has for has, *_ in said):
                if not count:
                    raise NoDataError(f"{self!r}: no process has a batch that counts")
                return
            if not self._fsdp and any(one[::2] != said[0][::2] for one in said):
                raise RemoteError(
                    0,
                    f"{self!r}: without fully_shard all processes hold parts of one model, and have to "
                    "read the same batches; pass each all of the data",
                )
            if any(not has and bare for has, bare, *_ in said):
                first = next(rank for rank, (has, *_) in enumerate(said) if has)
                other = team.everyone(batch if team.rank == first else None)[first]
                self._spare = other if self._spare is None else self._spare
            if batch is not None:
                self._spare = batch
            ranks, rank = (team.size, team.rank) if self._fsdp else (1, 0)
            yield self._spare, weight, self.risk.seed + count * ranks + rank
            count += 1

    # -- the proof --------------------------------------------------------------------------------

    def _prove(self) -> None:
        """Refuse exact products that differences of gradients do not bear out, by the parameter."""
        settings = self.risk.function.now.settings()
        if not any(self.team.everyone(settings != self._proven)):
            return
        point = self.risk.parameters()
        generator = torch.Generator().manual_seed(0)
        u, v = (
            {
                n: _like(torch.randn(p.shape, generator=generator, dtype=torch.float64), p)
                for n, p in point.items()
            }
            for _ in range(2)
        )
        said = "use FiniteDifference(), or a whole copy of the model"
        Hu, Hv = self._exact(u), self._exact(v)
        expected, noise = self._difference(v)
        tolerance = rounding(point.values()) ** (1 / 3)
        for name in point:
            off, size = _norm({name: Hv[name] - expected[name]}), _norm({name: expected[name]})
            if not off <= tolerance * size + noise:
                raise TypeError(
                    f"{self!r}: torch's second derivative by {name} is off by {off / max(size, off):.0%} "
                    f"from differences of gradients, as of tensor-parallel layers it may be; {said}"
                )
        forms = [_inner(u, Hv), _inner(v, Hu)]
        if not abs(forms[0] - forms[1]) <= tolerance * _norm(u) * _norm(Hv):
            raise TypeError(
                f"{self!r}: u'Hv = {forms[0]:g} and v'Hu = {forms[1]:g}, which is no Hessian; {said}"
            )
        self._proven = settings

    def report(self) -> str:
        """How products are made, and what error they have."""
        error = "exact, compared with differences of gradients once"
        if isinstance(self.strategy, FiniteDifference):
            last = "not measured yet" if self.error is None else f"{self.error:.1e}"
            error = f"relative error {last}, at most {self._largest:.1e} so far"
        return f"{self.strategy!r} of a model in {self.team.size} parts: {error}"

    def _label(self) -> str:
        return f"{type(self).__name__}[{self.strategy!r}, {self.team.size}]"


_MUCH = 0.01
"""Of a product: an error of which there is a warning, once."""

_UNSURE = sqrt(65 / 45)
"""Error of ``a + (a - b) / 3`` against ``a - b`` where both have rounding errors of their own, b's half as large."""


class _Moved(Exchange):
    """Parameters moved in place, part by part, and put back to the bit."""

    def __init__(self, point: Parts) -> None:
        super().__init__()
        self._parts = {name: _local(p) for name, p in point.items()}
        self._kept: Parts = {}

    def _change(self) -> None:
        for name, part in self._parts.items():
            self._kept[name] = part.clone()
            self._noted(part.copy_, self._kept[name])

    def by(self, v: Parts, h: float) -> None:
        for name, part in self._parts.items():
            part.copy_(self._kept[name] + h * _local(v[name]))


class _Trained(Exchange):
    """An FSDP2 model that gathers and reduces as in a training step; its switches are put back."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__()
        self._parts = parts

    def _change(self) -> None:
        for part in self._parts:
            self._noted(_torch.set_resharding, part, _torch.resharding(part))
            self._noted(part.reshard)
            part.set_reshard_after_backward(True, recurse=False)
            part.set_requires_gradient_sync(True, recurse=False)
            _torch.divide_by_processes(part)


class _Buffers(Exchange):
    """Buffers that a forward pass may write to, put back."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__()
        self._buffers = list(risk.model.buffers())

    def _change(self) -> None:
        for buffer in self._buffers:
            self._noted(buffer.detach().copy_, buffer.detach().clone())


def _local(tensor: Tensor) -> Tensor:
    """The part held here, in the memory that it has there."""
    known: Any = tensor.detach()
    part: Tensor = known.to_local() if _torch.is_distributed(tensor) else known
    return part


def _like(whole: Tensor, p: Tensor) -> Tensor:
    """A tensor that all processes have, in parts as those of ``p``."""
    known: Any = p
    whole = whole.to(device=p.device, dtype=p.dtype)
    if not _torch.is_distributed(p):
        return whole.clone()
    return _torch.distributed_tensor(whole.contiguous(), known.device_mesh, known.placements)


def _placed(tensor: Any, p: Any) -> Any:
    """A tensor in parts as those of ``p``, which it may be a gradient of."""
    if _torch.is_distributed(tensor) and tensor.placements != p.placements:
        return tensor.redistribute(p.device_mesh, p.placements)
    return tensor


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if _torch.is_distributed(tensor) else tensor
    return found.detach()


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Over all entries, once each."""
    return sum(
        float(_whole((a[name].detach().double() * b[name].detach().double()).sum())) for name in a
    )


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return sqrt(_inner(tensors, tensors))
