"""Which ops torch cannot differentiate twice is found out on the torch at hand, by tiny cases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import _torch

Op = Callable[..., Any]
Probe = Callable[[Tensor], Tensor]
"""A case of an op: a function of a matrix, float64, 4 x 6, no entry like another."""


class Needed:
    """Whether an op needs its formula: once per process and kind of device, when it is first met.

    It does not if value, gradient, second and third derivatives and products with several columns
    are those of the formula in each of its cases. In forward mode, and while something traces or
    transforms what runs, nothing can be tried out, and the formula serves.
    """

    def __init__(self, op: Op, formula: Op, probes: tuple[Probe, ...]) -> None:
        self._op, self._formula, self._probes = op, formula, probes
        self._known: dict[str, bool] = {}

    def __call__(self, device: torch.device) -> bool:
        if not self._probes or _torch.dual_depth() >= 0:
            return True
        known = self._known.get(device.type)
        if known is None:
            if _is_traced():
                return True
            known = self._known[device.type] = not self._is_right(device)
        return known

    def _is_right(self, device: torch.device) -> bool:
        try:
            x = _point(device)
            return all(self._agree(probe, x) for probe in self._probes)
        except Exception:  # torch has no derivative, the device no float64
            return False

    def _agree(self, probe: Probe, x: Tensor) -> bool:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*(deprecated|in beta|different to the input)")
            warnings.filterwarnings("ignore", "Anomaly Detection")
            own, formulas = (_derivatives(probe, x, t) for t in ({}, {self._op: self._formula}))
        return all(
            torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING)
            for a, b in zip(own, formulas, strict=True)
        )


_ROUNDING = 1e-9  # float64; a derivative that is wrong is off by more


class _Only(TorchFunctionMode):
    """A mode, since torch loses arguments of some functions in any; with the formula of an op, or none."""

    def __init__(self, table: Mapping[Op, Op]) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(self, func: Op, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = self._table.get(func)
        result = None if formula is None else formula(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _derivatives(probe: Probe, x: Tensor, table: Mapping[Op, Op]) -> tuple[Tensor, ...]:
    """The value, and products with derivatives of orders one to three."""
    x = x.clone().requires_grad_()
    v = torch.stack((x.detach().cos(), x.detach().exp()))
    with _Only(table):
        value = probe(x)
    weights = torch.linspace(0.4, 1.1, value.numel(), dtype=x.dtype, device=x.device)
    finite = torch.where(value.isfinite(), value, 0).flatten()
    loss = (weights * finite).sum() * (1 + 0.1 * finite.sum())
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    second = torch.autograd.grad(gradient, x, v, is_grads_batched=True, retain_graph=True)[0]
    (along,) = torch.autograd.grad(gradient, x, v[0], create_graph=True)
    third = (
        torch.autograd.grad(along, x, v[1], allow_unused=True)[0] if along.requires_grad else None
    )
    return (
        value.detach(),
        gradient.detach(),
        second,
        along.detach(),
        torch.zeros_like(x) if third is None else third,
    )


def _point(device: torch.device) -> Tensor:
    return (torch.arange(24.0, dtype=torch.float64, device=device) * 0.7 + 0.3).sin().reshape(4, 6)


def _is_traced() -> bool:
    return (
        _torch.dispatch_modes() > 0
        or _torch.tracing_state() is not None
        or _torch.transforms() is not None
    )


# --- cases --------------------------------------------------------------------------------------


def _labels(x: Tensor) -> Tensor:
    return torch.tensor([1, 0, 5, 2], device=x.device)


def _words(x: Tensor) -> Tensor:
    return torch.tensor([[1, 0, 3], [2, 3, 3]], device=x.device)


def _ctc(op: Op, frames: int, **options: Any) -> Probe:
    def probe(x: Tensor) -> Tensor:
        spelt = torch.tensor([[1, 2, 2]], device=x.device)
        long = torch.cat((x, x.cos()))[:, None].log_softmax(-1)
        counts = torch.tensor([frames]), torch.tensor([3])
        return cast(Tensor, op(long, spelt, *counts, **options))

    return probe


def _bag(**options: Any) -> Probe:
    return lambda x: F.embedding_bag(_words(x), x, **options)


def _with_equal_values(x: Tensor) -> Tensor:
    """Near an orthogonal matrix as a constant, and x as what moves it: all singular values are 1."""
    q: Tensor = torch.linalg.qr(x.detach()[:, :4])[0]
    return q + (x[:, :4] - x.detach()[:, :4])


def _symmetric(x: Tensor) -> Tensor:
    moved = x[:, :4] - x.detach()[:, :4]
    return moved + moved.mT + torch.diag(x.new_tensor([1.0, 1.0, -1.0, -1.0]))


def _at_zero(distance: Tensor) -> Tensor:
    """Smooth at distance zero, where the distance is not."""
    return torch.exp(-distance.square())


def _triangle(x: Tensor) -> Tensor:
    return x[:, :4].tril() + 3 * torch.eye(4, dtype=x.dtype, device=x.device)


def _scattered(rows: list[int]) -> Probe:
    def probe(x: Tensor) -> Tensor:
        index = torch.tensor([[0, 1, 0, 1], [2, 2, 2, 2]], device=x.device)
        zeros = _with_zeros(x, rows)
        return torch.scatter_reduce(x.cos() * zeros, 1, index, zeros[:2, :4] * 1, "prod")

    return probe


def _indexed(reduce: str, rows: list[int]) -> Probe:
    def probe(x: Tensor) -> Tensor:
        zeros = _with_zeros(x, rows)
        return torch.index_reduce(x.cos() * zeros, 0, _labels(x) % 4, zeros * 1, reduce)

    return probe


def _with_zeros(x: Tensor, rows: list[int]) -> Tensor:
    keep = torch.ones_like(x)
    keep[rows] = 0
    return x * keep


def _distances(op: Op, p: float) -> Probe:
    return lambda x: cast(Tensor, op(_several(x), x.cos(), p))


def _several(x: Tensor) -> Tensor:
    """32 rows, of which torch takes the distances in another way."""
    return torch.cat([x * k + k / 3 for k in range(1, 9)])


def _chunks(x: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    weight = torch.cat((x, x.cos()))[:6]
    return cast(Tensor, _torch.linear_cross_entropy(x, weight, _labels(x), options=options))


def _margin(p: int) -> Probe:
    return lambda x: F.multi_margin_loss(x, _labels(x), p=p, margin=0.8)


def _weighted_huber(x: Tensor) -> Tensor:
    huber: Op = F.huber_loss
    return cast(Tensor, huber(2 * x, x.detach().cos(), weight=x.detach().exp()))


def _normed(dim: int) -> Probe:
    return lambda x: torch._weight_norm(x, x.narrow(1 - dim, 0, 1).cos(), dim)


def _inverse(upper: bool) -> Probe:
    return lambda x: torch.cholesky_inverse(_triangle(x).mT if upper else _triangle(x), upper)


def _solved(transpose: bool) -> Probe:
    return lambda x: torch.triangular_solve(x, _triangle(x), False, transpose)[0]


def _without(x: Tensor) -> Tensor:
    return x.masked_fill(x < 0, -math.inf)


_POWERS = (1.0, 1.5, 2.0, 3.0, math.inf)
_linalg: Any = torch.linalg

PROBES: dict[Op, tuple[Probe, ...]] = {
    **dict.fromkeys((F.l1_loss, torch.lstm), ()),  # not a matter of derivatives; of cuDNN's alone
    F.hardsigmoid: (lambda x: F.hardsigmoid(3 * x),),
    F.mse_loss: (
        lambda x: F.mse_loss(x, x.detach().cos()),
        lambda x: F.mse_loss(x, x.cos(), reduction="none"),
    ),
    F.huber_loss: (
        lambda x: F.huber_loss(2 * x, x.detach().cos(), delta=0.7),
        lambda x: F.huber_loss(2 * x, x.cos(), reduction="none", delta=0.7),
        _weighted_huber,
    ),
    F.soft_margin_loss: (lambda x: F.soft_margin_loss(x, x.detach().cos().sign()),),
    F.multi_margin_loss: (_margin(1), _margin(2)),
    F.multilabel_margin_loss: (lambda x: F.multilabel_margin_loss(x, x.detach().argsort(1) - 2),),
    F.ctc_loss: (_ctc(F.ctc_loss, 8), _ctc(F.ctc_loss, 3, zero_infinity=True)),
    F.embedding: (
        lambda x: F.embedding(_words(x), x, padding_idx=3),
        lambda x: F.embedding(_words(x), x, sparse=True),
    ),
    F.embedding_bag: (
        *(_bag(mode=mode) for mode in ("sum", "mean", "max")),
        _bag(mode="sum", sparse=True),
        lambda x: F.embedding_bag(_words(x), x, mode="sum", per_sample_weights=x[:2, :3].cos()),
    ),
    torch._weight_norm: (_normed(0), _normed(1)),
    torch.cdist: (
        *(_distances(torch.cdist, p) for p in _POWERS),
        lambda x: torch.cdist(x, x[:3].cos()),
        lambda x: _at_zero(torch.cdist(x, x)),
        lambda x: _at_zero(torch.cdist(_several(x), x)),
    ),
    torch.pdist: (
        *(_distances(lambda x, y, p: F.pdist(x, p), p) for p in _POWERS),
        lambda x: _at_zero(F.pdist(torch.cat((x, x)))),
    ),
    torch.scatter_reduce: tuple(_scattered(rows) for rows in ([], [0], [0, 1])),
    torch.index_reduce: (
        *(_indexed("prod", rows) for rows in ([], [0], [0, 2], [1])),
        *(_indexed(reduce, []) for reduce in ("mean", "amax")),
    ),
    torch.renorm: (lambda x: torch.renorm(_with_zeros(x, [2]), 2, 0, 0.5),),
    torch.cholesky_inverse: (_inverse(True), _inverse(False)),
    _torch.linear_cross_entropy: (_chunks,),
    torch.sinc: (lambda x: torch.sinc(x - x.detach() * (x.detach() > 0)),),
    torch.logaddexp: (
        lambda x: torch.logaddexp(_without(x), x.cos()),
        lambda x: torch.logaddexp(_without(x), _without(x)),
    ),
    torch.native_layer_norm: (
        lambda x: torch.native_layer_norm(x, [6], None, x[0].cos(), 1e-5)[0],
    ),
    torch.triangular_solve: (_solved(True), _solved(False)),
    torch.linalg.svdvals: (lambda x: _linalg.svdvals(_with_equal_values(x)).exp().sum(),),
    torch.linalg.eigvalsh: (lambda x: _linalg.eigvalsh(_symmetric(x)).exp().sum(),),
    torch.linalg.svd: (lambda x: _linalg.svd(_with_equal_values(x))[1].pow(3).sum(),),
    torch.linalg.eigh: (lambda x: _linalg.eigh(_symmetric(x))[0].pow(3).sum(),),
    torch.linalg.matrix_norm: (lambda x: _linalg.matrix_norm(_with_equal_values(x), "nuc"),),
}
"""Cases of an op, and of those that follow it in the table of `hvpop.risk.rewrites`."""
