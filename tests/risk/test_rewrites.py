"""Rewritten ops: equal to the op, twice differentiable in reverse and in forward mode."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from hvpop.risk.probes import PROBES, Needed
from hvpop.risk.rewrites import REWRITES, Rewrites

Op = Callable[..., Any]
Mode = Callable[[], contextlib.AbstractContextManager[Any]]
Product = Callable[["Case", Mode], Sequence[Tensor | None]]
REDUCTIONS = ("mean", "sum", "none")
HAS_CHUNKS = hasattr(F, "linear_cross_entropy")  # since torch 2.13


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, needed or not: each is right wherever a torch may need it."""
    monkeypatch.setattr(Needed, "__call__", lambda self, device: True)


@dataclass
class Case:
    """A row of the table at work: `op` calls `row` on differentiated inputs."""

    name: str
    row: Callable[..., Any]
    op: Op
    inputs: Sequence[Tensor]
    directions: Sequence[Tensor] = ()  # default: random

    def vectors(self) -> Sequence[Tensor]:
        return self.directions or [randn(*x.shape, seed=90 + i) for i, x in enumerate(self.inputs)]


# --- one case or more per row -----------------------------------------------------------------

X, T = randn(4, 6), randn(4, 6, seed=1)
LABELS = torch.tensor([1, 0, 5, 2])
CLASS_WEIGHTS = torch.arange(1.0, 7.0, dtype=torch.float64)
LABEL_SETS = torch.tensor([[0, 3, -1, 2, 2, 2], [1, 1, -1, 0, 0, 0], [-1] * 6, [0, 1, 2, 3, 4, 5]])
TABLE = randn(8, 3)
WORDS = torch.tensor([[1, 0, 3], [7, 3, 3]])


def losses() -> Iterator[Case]:
    for r in REDUCTIONS:
        yield Case(f"mse {r}", F.mse_loss, lambda x, r=r: F.mse_loss(x, T, reduction=r), [X])
        yield Case(
            f"mse, target too, {r}",
            F.mse_loss,
            lambda x, t, r=r: F.mse_loss(x, t, reduction=r),
            [X, T],
        )
        yield Case(
            f"mse weighted {r}",
            F.mse_loss,
            lambda x, r=r: F.mse_loss(x, T, reduction=r, weight=T.square()),
            [X],
        )
        yield Case(
            f"huber {r}",
            F.huber_loss,
            lambda x, t, r=r: F.huber_loss(x, t, reduction=r, delta=0.7),
            [X, T],
        )
        yield Case(
            f"huber weighted {r}",
            F.huber_loss,
            lambda x, r=r: F.huber_loss(x, T, reduction=r, weight=T.square()),
            [X],
        )
        yield Case(
            f"l1 weighted {r}",
            F.l1_loss,
            lambda x, r=r: F.l1_loss(x, T, reduction=r, weight=T.square()),
            [X],
        )
        yield Case(
            f"soft margin {r}",
            F.soft_margin_loss,
            lambda x, r=r: F.soft_margin_loss(x, T.sign(), reduction=r),
            [X],
        )
        for p in (1, 2):
            yield Case(
                f"multi margin p={p} {r}",
                F.multi_margin_loss,
                lambda x, r=r, p=p: F.multi_margin_loss(
                    x, LABELS, p=p, margin=0.8, weight=CLASS_WEIGHTS, reduction=r
                ),
                [X],
            )
        yield Case(
            f"multilabel margin {r}",
            F.multilabel_margin_loss,
            lambda x, r=r: F.multilabel_margin_loss(x, LABEL_SETS, reduction=r),
            [X],
        )
    yield Case("hardsigmoid", F.hardsigmoid, lambda x: F.hardsigmoid(3 * x), [X])
    yield Case(
        "hardsigmoid in place",
        F.hardsigmoid,
        lambda x: F.hardsigmoid(3 * x, inplace=True),
        [X],
    )
    yield Case(
        "multi margin, one sample",
        F.multi_margin_loss,
        lambda x: F.multi_margin_loss(x, torch.tensor(2), reduction="none"),
        [X[0]],
    )
    yield Case(
        "multilabel margin, one sample",
        F.multilabel_margin_loss,
        lambda x: F.multilabel_margin_loss(x, LABEL_SETS[0], reduction="none"),
        [X[0]],
    )


def ctc() -> Iterator[Case]:
    logits = randn(8, 3, 5)
    targets = torch.tensor([[1, 2, 2], [3, 1, 0], [4, 0, 0]])
    frames, lengths = torch.tensor([8, 7, 5]), torch.tensor([3, 2, 0])
    joined = torch.tensor([1, 2, 2, 3, 1])

    def case(name: str, *args: Any, inputs: Tensor = logits, **kwargs: Any) -> Case:
        return Case(
            f"ctc {name}",
            F.ctc_loss,
            lambda x: F.ctc_loss(x.log_softmax(-1), *args, **kwargs),
            [inputs],
        )

    for r in REDUCTIONS:
        yield case(r, targets, frames, lengths, reduction=r)
    yield case("joined targets", joined, frames, lengths)
    yield case("tuples", joined, (8, 7, 5), (3, 2, 0))
    yield case("32-bit", targets.int(), frames.int(), lengths.int(), reduction="none")
    yield case("last blank", targets, frames, lengths, blank=4)
    short = torch.tensor([3, 7, 5])  # three frames cannot spell 1 2 2
    yield case("impossible", targets, short, lengths, zero_infinity=True, reduction="none")
    one = (targets[0], torch.tensor(8), torch.tensor(3))
    yield case("one sequence", *one, reduction="none", inputs=logits[:, 0])
    yield case("no frame", targets, torch.tensor([8, 7, 0]), lengths, reduction="none")
    yield Case(
        "torch.ctc_loss",
        torch.ctc_loss,
        lambda x: torch.ctc_loss(x.log_softmax(-1), targets, frames, lengths, 0, 2),
        [logits],
    )


def embeddings() -> Iterator[Case]:
    def away_from(row: int) -> list[Tensor]:
        v = randn(8, 3, seed=90)
        v[row] = 0  # the row of the padding is a constant
        return [v]

    def case(name: str, v: Sequence[Tensor] = (), **kwargs: Any) -> Case:
        return Case(
            f"embedding {name}", F.embedding, lambda w: F.embedding(WORDS, w, **kwargs), [TABLE], v
        )

    yield case("padding", away_from(3), padding_idx=3)
    yield case("padding first", away_from(0), padding_idx=0)
    yield case("padding from the end", away_from(7), padding_idx=-1)
    yield case("sparse", sparse=True)
    yield case("sparse padding", away_from(3), sparse=True, padding_idx=3)
    yield case("long rows allowed", max_norm=100.0)
    yield Case(
        "torch.embedding",
        torch.embedding,
        lambda w: torch.embedding(w, WORDS, padding_idx=3, sparse=True),
        [TABLE],
        away_from(3),
    )


def bags() -> Iterator[Case]:
    flat, starts = WORDS.reshape(-1), torch.tensor([0, 2, 2, 5])  # the second one is empty

    def case(name: str, *args: Any, words: Tensor = flat, **kwargs: Any) -> Case:
        def op(w: Tensor, *weights: Tensor) -> Tensor:
            if weights:
                kwargs["per_sample_weights"] = weights[0]
            return F.embedding_bag(words, w, *args, **kwargs)

        inputs = [TABLE, randn(*words.shape, seed=2)] if "weighted" in name else [TABLE]
        return Case(f"bag {name}", F.embedding_bag, op, inputs)

    for mode in ("sum", "mean", "max"):
        yield case(f"{mode} rectangular", mode=mode, words=WORDS)
        yield case(f"{mode} offsets", starts, mode=mode)
        yield case(f"{mode} padding", starts, mode=mode, padding_idx=3)
        yield case(f"{mode} padding from the end", mode=mode, padding_idx=-5, words=WORDS)
        ends = torch.tensor([0, 2, 2, 6])
        yield case(f"{mode} last offset", ends, mode=mode, include_last_offset=True)
        yield case(f"{mode} 32-bit", starts.int(), mode=mode, words=flat.int())
    yield case("sum sparse", mode="sum", sparse=True, words=WORDS)
    yield case("sum long rows allowed", mode="sum", max_norm=100.0, words=WORDS)
    yield case("sum weighted", mode="sum", words=WORDS)
    yield case("sum weighted offsets", starts, mode="sum", padding_idx=3)


def others() -> Iterator[Case]:
    v = randn(5, 3, 2)
    for dim, shape in ((0, (5, 1, 1)), (1, (1, 3, 1)), (2, (1, 1, 2)), (-2, (1, 3, 1)), (-1, ())):
        yield Case(
            f"weight norm dim={dim}",
            torch._weight_norm,
            lambda v, g, dim=dim: torch._weight_norm(v, g, dim),
            [v, randn(*shape, seed=3) if shape else torch.tensor(1.3, dtype=torch.float64)],
        )
    yield Case("weight norm of a vector", torch._weight_norm, torch._weight_norm, [X[0], T[0]])
    few = randn(2, 4, 3), randn(2, 5, 3, seed=1)
    for p in (1.0, 1.5, 2.0, 3.0, math.inf):
        yield Case(f"cdist p={p}", torch.cdist, lambda x, y, p=p: torch.cdist(x, y, p), few)
        yield Case(f"pdist p={p}", F.pdist, lambda x, p=p: F.pdist(x, p), [X])
    yield Case("cdist many", torch.cdist, torch.cdist, [randn(30, 3), randn(2, 3, seed=1)])
    use = "use_mm_for_euclid_dist"
    yield Case("cdist product", torch.cdist, lambda x, y: torch.cdist(x, y, compute_mode=use), few)
    several = torch.tensor([[0, 1, 0, 1, 3], [2, 2, 2, 2, 2], [5, 0, 1, 2, 3]])
    zeros = X.clone()
    zeros[0, 0] = zeros[1, 2] = zeros[2, 2] = 0
    for name in ("torch.scatter_reduce", "Tensor.scatter_reduce", "Tensor.scatter_reduce_"):
        row = getattr(torch.Tensor if "Tensor" in name else torch, name.split(".")[1])
        for include in (True, False):
            for x in (X, zeros):
                yield Case(
                    f"{name} {include}{' zeros' if x is zeros else ''}",
                    row,
                    lambda x, y, row=row, include=include: row(
                        1.0 * x, 1, several, y, "prod", include_self=include
                    ),
                    [x, T[:3, :5]],
                )
    yield Case(
        "scatter_reduce along rows",
        torch.scatter_reduce,
        lambda x, y: torch.scatter_reduce(x, -2, several % 4, y, "prod"),
        [X, T[:3, :5]],
    )
    lower = torch.tril(randn(4, 4)) + 3 * torch.eye(4, dtype=torch.float64)
    for row, name in (
        (torch.cholesky_inverse, "torch"),
        (torch.Tensor.cholesky_inverse, "Tensor"),
    ):
        yield Case(f"{name}.cholesky_inverse", row, lambda a, row=row: row(a.tril()), [lower])
        yield Case(f"{name} upper", row, lambda a, row=row: row(a.tril().mT, upper=True), [lower])


def recurrent() -> Iterator[Case]:
    x, state = randn(4, 2, 3), randn(1, 2, 5, seed=1)
    for row, gates in ((torch.lstm, 4), (torch.gru, 3), (torch.rnn_tanh, 1), (torch.rnn_relu, 1)):
        weights = [randn(gates * 5, 3, seed=2), randn(gates * 5, 5, seed=3)]

        def op(x: Tensor, *weights: Tensor, row: Op = row) -> Tensor:
            start = (state, state) if row is torch.lstm else state
            return row(x, start, weights, False, 1, 0.0, False, False, False)[0]

        yield Case(row.__name__, row, op, [x, *weights])


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    q: Tensor = torch.linalg.qr(randn(*shape, seed=seed))[0]
    return q


def with_values(*values: float, rows: int = 0) -> Tensor:
    """A matrix that has these singular values, some of them equal."""
    n = len(values)
    s = torch.tensor(values, dtype=torch.float64)
    return (orthogonal(rows or n, n) * s) @ orthogonal(n, n, seed=1)


def symmetric_with(*values: float) -> Tensor:
    q = orthogonal(len(values), len(values))
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.mT


def spectra() -> Iterator[Case]:
    linalg = torch.linalg
    matrices = {
        "orthogonal": orthogonal(4, 4),
        "tall": orthogonal(6, 3),
        "wide": orthogonal(6, 3).mT.contiguous(),
        "pairs": with_values(2, 2, 1, 1, 0.5),
        "almost": with_values(2, 2 + 1e-11, 1, 1 + 1e-9),
        "apart": randn(4, 4),
        "some of a batch": torch.stack((orthogonal(3, 3), randn(3, 3))),
    }
    for name, a in matrices.items():
        yield Case(
            f"svdvals {name}", linalg.svdvals, lambda a: linalg.svdvals(a).exp().sum(-1), [a]
        )
        yield Case(
            f"nuclear norm {name}",
            linalg.matrix_norm,
            lambda a: linalg.matrix_norm(a, "nuc", keepdim=True),
            [a],
        )
    low = with_values(2, 1, 0, 0, rows=5)
    yield Case(
        "svdvals of low rank",
        linalg.svdvals,
        lambda a: linalg.svdvals(a).square().sin().sum(),
        [low],
    )
    a, pairs = randn(2, 4, 3), matrices["pairs"]
    yield Case("2-norm", linalg.matrix_norm, lambda a: linalg.matrix_norm(a, 2, (0, 2)), [a])
    yield Case("-2-norm", linalg.norm, lambda a: linalg.norm(a, -2, (2, 1)), [a])
    yield Case("linalg.norm", linalg.norm, lambda a: linalg.norm(a, "nuc"), [pairs])
    yield Case("torch.norm", torch.norm, lambda a: torch.norm(a, "nuc"), [pairs])
    yield Case(
        "torch.norm, keepdim",
        torch.norm,
        lambda a: torch.norm(a, "nuc", dim=(0, 1), keepdim=True),
        [pairs],
    )
    yield Case("Tensor.norm", torch.Tensor.norm, lambda a: a.norm("nuc"), [pairs])
    yield Case("nuclear_norm", torch.nuclear_norm, lambda a: torch.nuclear_norm(a, True), [pairs])
    middle = with_values(3, 1, 1, 0.5)
    for p in (None, 2, -2):
        yield Case(f"cond {p}", linalg.cond, lambda a, p=p: linalg.cond(a, p), [middle])
    yield Case("linalg.svd", linalg.svd, lambda a: linalg.svd(a)[1].pow(3).sum(), [pairs])
    yield Case("torch.svd", torch.svd, lambda a: torch.svd(a).S.pow(3).sum(), [pairs])
    yield Case("Tensor.svd", torch.Tensor.svd, lambda a: a.svd().S.pow(3).sum(), [pairs])
    equal = symmetric_with(3, 3, -1, -1, -1)
    for uplo in ("L", "U"):
        yield Case(
            f"eigvalsh {uplo}",
            linalg.eigvalsh,
            lambda a, uplo=uplo: linalg.eigvalsh(a + a.mT, uplo).exp().sum(),
            [equal],
        )
        yield Case(
            f"eigh {uplo}",
            linalg.eigh,
            lambda a, uplo=uplo: linalg.eigh(a + a.mT, uplo)[0].pow(3).sum(),
            [equal],
        )


def smooth(distance: Tensor) -> Tensor:
    """A function with slope zero and curvature at distance zero, which couples the distances."""
    bumps = torch.exp(-distance.square())
    return bumps + 0.1 * bumps.sum() * distance.cos()


def zero_distances() -> Iterator[Case]:
    x = randn(5, 3)
    y = torch.cat((x[:2], randn(2, 3, seed=1), x[4:]))
    many = torch.cat((x, randn(24, 3, seed=2)))
    yield Case("cdist at zero", torch.cdist, lambda x, y: smooth(torch.cdist(x, y)), [x, y])
    yield Case("cdist many at zero", torch.cdist, lambda y: smooth(torch.cdist(many, y)), [y])
    yield Case(
        "cdist of a batch at zero",
        torch.cdist,
        lambda x: smooth(torch.cdist(x, many)),
        [torch.stack((x, y))],
    )
    yield Case("pdist at zero", F.pdist, lambda y: smooth(F.pdist(y)), [torch.cat((x, y))])
    for p in (1.0, 3.0, math.inf):
        yield Case(
            f"cdist p={p} at zero, on a line",
            torch.cdist,
            lambda x, y, p=p: smooth(torch.cdist(x[:, :1], y[:, :1], p)),
            [x, y],
        )
    yield Case("cdist p=4 at zero", torch.cdist, lambda x: torch.cdist(x, y, 4.0) ** 4, [x])
    yield Case("cdist p=0", torch.cdist, lambda x: x.sum() * torch.cdist(x, -y, 0.0), [x])


def removable() -> Iterator[Case]:
    """Ops whose derivatives are quotients or differences that are not numbers somewhere."""
    x = torch.tensor([0.0, -0.1, 0.15, 0.16, 0.7, -1, 3], dtype=torch.float64)
    yield Case("sinc", torch.sinc, torch.sinc, [x])
    yield Case("special.sinc", torch.special.sinc, torch.special.sinc, [x])
    yield Case("Tensor.sinc", torch.Tensor.sinc, torch.Tensor.sinc, [x])
    yield Case("sinc in place", torch.Tensor.sinc_, lambda x: (x * 1).sinc_(), [x])
    nowhere = torch.tensor([[True] * 4, [True, False, False, True]])
    for row in (torch.logaddexp, torch.Tensor.logaddexp):
        yield Case(
            f"{'Tensor' if row is torch.Tensor.logaddexp else 'torch'}.logaddexp",
            row,
            lambda x, y, row=row: row(
                x.masked_fill(nowhere, -math.inf)[:, 1:], y.masked_fill(nowhere[1], -math.inf)[1:]
            )[1:, :2],
            [randn(2, 4), randn(4, seed=1)],
        )
    yield Case(
        "native_layer_norm",
        torch.native_layer_norm,
        lambda x, b: torch.native_layer_norm(x, [6], None, b, 1e-5)[0],
        [X, T[0]],
    )
    gaps = X * torch.tensor([1, 1, 0, 1])[:, None]
    for spelling in ("torch.renorm", "Tensor.renorm", "Tensor.renorm_"):
        row = getattr(torch.Tensor if "Tensor" in spelling else torch, spelling.split(".")[1])
        yield Case(spelling, row, lambda x, row=row: row(x * 1, 2, 0, 2.0), [gaps])
    for spelling in ("torch.index_reduce", "Tensor.index_reduce", "Tensor.index_reduce_"):
        row = getattr(torch.Tensor if "Tensor" in spelling else torch, spelling.split(".")[1])
        for reduce in ("prod", "mean", "amax"):
            yield Case(
                f"{spelling} {reduce}",
                row,
                lambda x, y, row=row, reduce=reduce: row(
                    x * 1, 0, LABELS % 4, y, reduce, include_self=reduce != "mean"
                ),
                [gaps, T] if reduce == "prod" else [X, T],
            )
    triangle = randn(4, 4) + 3 * torch.eye(4, dtype=torch.float64)
    for row in (torch.triangular_solve, torch.Tensor.triangular_solve):
        for transpose in (True, False):
            yield Case(
                f"{'Tensor' if row is torch.Tensor.triangular_solve else 'torch'}"
                f".triangular_solve {transpose}",
                row,
                lambda b, a, row=row, t=transpose: row(b, a, False, t)[0],
                [randn(4, 2), triangle],
            )


def chunked() -> Iterator[Case]:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    for r in REDUCTIONS:
        yield Case(
            f"linear cross entropy {r}",
            F.linear_cross_entropy,
            lambda x, w, b, r=r: F.linear_cross_entropy(
                x, w, LABELS, linear_bias=b, weight=CLASS_WEIGHTS, reduction=r, options=options
            ),
            [X, randn(6, 6, seed=2), T[0]],
        )
    yield Case(
        "linear cross entropy, one sample",
        F.linear_cross_entropy,
        lambda x, w: F.linear_cross_entropy(x, w, LABELS[0], ignore_index=3, options=options),
        [X[0], randn(6, 6, seed=2)],
    )


CASES = [*losses(), *ctc(), *embeddings(), *bags(), *others(), *recurrent()]
CASES += [*spectra(), *zero_distances(), *removable()]
CASES += chunked() if HAS_CHUNKS else []
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# --- the truth: torch's own first derivatives ---------------------------------------------------


def scalar(case: Case, xs: Sequence[Tensor]) -> Tensor:
    """Two terms that couple all entries of the result, so that no second derivative is missed."""
    result = case.op(*xs)
    finite = result.masked_fill(result.isinf(), 0)
    weighted = (finite * randn(*result.shape, seed=7)).sum()
    return weighted + 0.1 * weighted * finite.sum()


def gradient(case: Case, xs: Sequence[Tensor]) -> list[Tensor]:
    xs = [x.detach().clone().requires_grad_() for x in xs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scalar(case, xs).backward()
    return [x.grad.to_dense() if x.grad is not None else torch.zeros_like(x) for x in xs]


def finite_difference(case: Case) -> list[Tensor]:
    """Fourth-order central difference of the gradients that `backward()` of the op itself gives."""
    h, total = 1e-4, [torch.zeros_like(x) for x in case.inputs]
    for step, factor in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        point = [x + step * h * v for x, v in zip(case.inputs, case.vectors(), strict=True)]
        for t, g in zip(total, gradient(case, point), strict=True):
            t += factor * g / (12 * h)
    return total


def close(ours: Sequence[Tensor | None], theirs: Sequence[Tensor], tolerance: float) -> None:
    scale = 1 + max(float(b.abs().max()) for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        a = torch.zeros_like(b) if a is None else a.detach()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


ROUNDING = 1e-13  # a few dozen operations in float64
DIFFERENCE = 1e-8  # rounding 1e-16 * |gradient| / h is 1e-12; the rest is h^4 of the derivatives
TORCH_SIXTH = 1e-7  # torch's derivative of hardsigmoid has 1/6 in float32, in float64 too


def tolerance(case: Case, usual: float) -> float:
    return TORCH_SIXTH if case.row is F.hardsigmoid else usual


def reverse_over_reverse(case: Case, mode: Mode) -> Sequence[Tensor | None]:
    xs = [x.clone().requires_grad_() for x in case.inputs]
    with mode():
        loss = scalar(case, xs)
    gradients = torch.autograd.grad(loss, xs, create_graph=True)
    return torch.autograd.grad(gradients, xs, case.vectors(), allow_unused=True)


def forward_over_reverse(case: Case, mode: Mode) -> Sequence[Tensor | None]:
    pairs = zip(case.inputs, case.vectors(), strict=True)
    with fwd.dual_level():
        xs = [fwd.make_dual(x.clone().requires_grad_(), v) for x, v in pairs]
        with mode():
            loss = scalar(case, xs)
        gradients = torch.autograd.grad(loss, xs, create_graph=True)
        return [fwd.unpack_dual(g).tangent for g in gradients]


PRODUCTS = (reverse_over_reverse, forward_over_reverse)
both_ways = pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
# Entering a dual level for the first time compiles decompositions with torch.jit.script.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),
    pytest.mark.filterwarnings("ignore:index_reduce.* is in beta:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*(nuclear_norm|triangular_solve) is deprecated:UserWarning"
    ),
]


# --- claims -------------------------------------------------------------------------------------


def test_every_row_has_a_case() -> None:
    assert set(REWRITES) == {case.row for case in CASES}


@pytest.mark.usefixtures("formulas")
@all_cases
def test_the_value_and_the_gradient_are_those_of_the_op(case: Case) -> None:
    seen: set[str] = set()
    xs = [x.clone().requires_grad_() for x in case.inputs]
    expected = case.op(*case.inputs)
    with Rewrites(seen):
        result = case.op(*case.inputs)
        loss = scalar(case, xs)
    torch.testing.assert_close(result, expected, rtol=ROUNDING, atol=ROUNDING)
    gradients = torch.autograd.grad(loss, xs)
    close(gradients, gradient(case, case.inputs), tolerance(case, ROUNDING))
    composed = case.name.startswith("mse weighted")  # torch itself makes it of ordinary ops
    assert seen == (set() if composed else {case.row.__name__})


@pytest.mark.usefixtures("formulas")
@both_ways
@all_cases
def test_products_by_formulas_are_the_derivative_of_the_gradient(
    case: Case, product: Product
) -> None:
    close(product(case, Rewrites), finite_difference(case), tolerance(case, DIFFERENCE))


@both_ways
@all_cases
def test_so_are_products_with_the_formulas_that_this_torch_needs(
    case: Case, product: Product
) -> None:
    close(product(case, Rewrites), finite_difference(case), tolerance(case, DIFFERENCE))


TRIED = [row for row, probes in PROBES.items() if probes and row in REWRITES]


@pytest.mark.parametrize("row", TRIED, ids=lambda row: row.__name__)
def test_an_op_that_torch_does_not_differentiate_is_found_to_need_its_formula(row: Op) -> None:
    def right(case: Case) -> bool:
        try:
            own = reverse_over_reverse(case, contextlib.nullcontext)
            close(own, finite_difference(case), DIFFERENCE)
        except (RuntimeError, AssertionError):
            return False
        return True

    seen: set[str] = set()
    for case in (case for case in CASES if case.row is row):
        with contextlib.suppress(Exception):
            reverse_over_reverse(case, lambda: Rewrites(seen))
        assert seen or right(case), "it is left to torch, which is wrong"


def test_an_op_that_torch_has_mended_is_left_to_it() -> None:
    needed = Needed(F.softplus, lambda x: (1 + x.exp()).log(), (lambda x: F.softplus(x),))
    assert not needed(torch.device("cpu"))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.detach() ** 3 + 3 * x.detach() ** 2 * (x - x.detach()),  # the first alone
        lambda x: torch.linalg.svdvals(x.diag_embed()).pow(3).flip(-1),  # another value
        torch.special.gammaln,  # others
    ],
)
def test_an_op_that_it_differentiates_in_another_way_is_not(op: Op) -> None:
    def called(x: Tensor) -> Tensor:
        result: Tensor = op(x)
        return result

    def probe(x: Tensor) -> Tensor:
        return F.softsign(x)

    def formula(x: Tensor) -> Tensor:
        return called(x)

    assert Needed(F.softsign, formula, (probe,))(torch.device("cpu"))


def test_nothing_is_tried_out_in_forward_mode_or_inside_a_transform() -> None:
    def fail(x: Tensor) -> Tensor:
        raise AssertionError("tried")

    needed = Needed(F.softplus, F.softplus, (fail,))
    with fwd.dual_level():
        assert needed(torch.device("cpu"))
    asked: list[bool] = []
    torch.func.grad(lambda x: (asked.append(needed(x.device)), x.sum())[1])(X)
    make_fx(lambda x: (asked.append(needed(x.device)), x.sum())[1])(X)
    assert asked == [True, True]
    assert needed._known == {}


def test_a_mode_of_torch_loses_the_weight_of_l1_loss() -> None:
    class Nothing(TorchFunctionMode):
        def __torch_function__(
            self, func: Op, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    with Nothing():
        lost = F.l1_loss(X, T, weight=T.square())
    with Rewrites():
        kept = F.l1_loss(X, T, weight=T.square())
    right = F.l1_loss(X, T, weight=T.square())
    assert torch.equal(kept, right)
    assert not torch.isclose(lost, right)


ACTIVATIONS = (
    *(F.celu, F.elu, F.gelu, F.glu, F.hardshrink, F.hardswish, F.hardtanh, F.leaky_relu, F.mish),
    *(F.logsigmoid, F.relu, F.relu6, F.selu, F.silu, F.softplus, F.softshrink, F.softsign),
    F.tanhshrink,
)
RIGHT_AS_THEY_ARE: dict[str, Op] = {
    **{op.__name__: op for op in ACTIVATIONS},
    "hardswish in place": lambda x: F.hardswish(2 * x, inplace=True),
    "mish in place": lambda x: F.mish(2 * x, inplace=True),
    "silu in place": lambda x: F.silu(2 * x, inplace=True),
    "smooth l1": lambda x: F.smooth_l1_loss(x, T, beta=0.7),
    "smooth l1, beta 0": lambda x: F.smooth_l1_loss(x, T, beta=0),
    "multilabel soft margin": lambda x: F.multilabel_soft_margin_loss(x, (T > 0).double()),
    "embedding": lambda w: F.embedding(WORDS % 4, w),
    "embedding by frequency": lambda w: F.embedding(WORDS % 4, w, scale_grad_by_freq=True),
    "scatter_reduce mean": lambda x: x.scatter_reduce(1, LABELS[:, None] % 4, T, "mean"),
}


@both_ways
@pytest.mark.parametrize("name", RIGHT_AS_THEY_ARE)
def test_an_op_that_is_right_is_left_alone(name: str, product: Product) -> None:
    seen: set[str] = set()
    case = Case(name, F.relu, RIGHT_AS_THEY_ARE[name], [X])
    close(product(case, lambda: Rewrites(seen)), finite_difference(case), DIFFERENCE)
    assert seen == set()


@both_ways
def test_the_padding_row_is_a_constant(product: Product) -> None:
    v = torch.zeros_like(TABLE)
    v[3] = 1
    op = partial(F.embedding, WORDS, padding_idx=3)
    (along,) = product(Case("", F.embedding, op, [TABLE], [v]), Rewrites)
    assert along is not None
    assert not along.any()
    (across,) = product(Case("", F.embedding, op, [TABLE]), Rewrites)
    assert across is not None
    assert not across[3].any()
    assert across[0].any()


def test_rows_longer_than_max_norm_are_shortened_outside_the_graph_and_not_in_place() -> None:
    plain, ours = (TABLE.clone().requires_grad_() for _ in range(2))
    expected = F.embedding(WORDS, plain, max_norm=0.8, norm_type=1.0)
    with Rewrites():
        result = F.embedding(WORDS, ours, max_norm=0.8, norm_type=1.0)
    torch.testing.assert_close(result, expected, rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(ours, TABLE)
    assert not torch.equal(plain, TABLE)
    gradients = [
        torch.autograd.grad(y.sin().sum(), w)[0] for y, w in ((result, ours), (expected, plain))
    ]
    torch.testing.assert_close(*gradients, rtol=ROUNDING, atol=ROUNDING)


KINKS: dict[str, Op] = {
    "hardsigmoid": lambda: (F.hardsigmoid, [torch.tensor([-3.0, 3.0, 0.0])]),
    "huber": lambda: (
        partial(F.huber_loss, target=torch.zeros(3).double()),
        [torch.tensor([-1.0, 1, 0])],
    ),
    "multi margin": lambda: (
        partial(F.multi_margin_loss, target=torch.tensor([0])),
        [torch.tensor([[1.0, 0, 0, 2]])],
    ),
    "multilabel margin": lambda: (
        partial(F.multilabel_margin_loss, target=torch.tensor([[0, -1, 0]])),
        [torch.tensor([[1.0, 0, 2]])],
    ),
    **{
        f"cdist p={p}": lambda p=p: (
            partial(torch.cdist, p=p),
            [torch.tensor([[0.0, 0, 1], [1, 2, 3]]), torch.tensor([[0.0, 0, 1], [2, 1, 3]])],
        )
        for p in (1.0, 1.5, 2.0, 3.0, math.inf)
    },
    "bag maximum": lambda: (
        lambda w: F.embedding_bag(torch.tensor([[0, 1, 2]]), w, mode="max"),
        [torch.tensor([[1.0, 2, 0], [1, 2, 1], [1, 0, 1]])],
    ),
    "impossible ctc": lambda: (
        lambda x: F.ctc_loss(
            x.log_softmax(-1), torch.tensor([[1, 1]]), (2,), (2,), zero_infinity=True
        ),
        [randn(2, 1, 3).float()],
    ),
}


@pytest.mark.parametrize("name", KINKS)
def test_derivatives_at_a_kink_follow_torch(name: str) -> None:
    op, inputs = KINKS[name]()
    results = []
    for mode in (contextlib.nullcontext, Rewrites):
        xs = [x.double().requires_grad_() for x in inputs]
        with mode():
            result = op(*xs)
        results.append(torch.autograd.grad(result.sum(), xs, create_graph=mode is Rewrites))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=TORCH_SIXTH, atol=ROUNDING)
        if ours.requires_grad:
            second = torch.autograd.grad(ours.sum(), xs, allow_unused=True, retain_graph=True)
            assert all(h is None or h.isfinite().all() for h in second)


def test_ctc_of_log_probabilities_that_are_not_normalised_has_the_gradient_of_torch() -> None:
    # That gradient is not the derivative of the value: only losses linear in the value agree.
    v = randn(6, 2, 4, seed=1)

    def gradient_at(t: float, mode: Mode = contextlib.nullcontext) -> tuple[Tensor, Tensor]:
        x = (randn(6, 2, 4) + t * v).requires_grad_()
        with mode():
            loss = F.ctc_loss(0.3 * x, torch.tensor([[1, 2], [3, 1]]), (6, 5), (2, 2))
        return x, torch.autograd.grad(loss, x, create_graph=mode is Rewrites)[0]

    h = 1e-3
    near, far = (gradient_at(t)[1] - gradient_at(-t)[1] for t in (h, 2 * h))
    x, ours = gradient_at(0, Rewrites)
    torch.testing.assert_close(ours, gradient_at(0)[1], rtol=0, atol=ROUNDING)
    (product,) = torch.autograd.grad(ours, x, v)
    torch.testing.assert_close(product, (8 * near - far) / (12 * h), rtol=0, atol=DIFFERENCE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_normalised_layers_are_seen(norm: Callable[[nn.Module], nn.Module]) -> None:
    seen: set[str] = set()
    layer = norm(nn.Linear(3, 4))
    with Rewrites(seen):
        layer(torch.ones(2, 3))
    assert seen == {"_weight_norm"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.mse_loss(X, T, reduction="average"), "average is not a valid value"),
        (lambda: F.huber_loss(X, T, delta=-1.0), "delta"),
        (lambda: F.multi_margin_loss(X, LABELS, p=3), "p == 1 and p == 2"),
        (lambda: F.embedding(WORDS, TABLE, padding_idx=8), "within num_embeddings"),
        (lambda: F.embedding_bag(WORDS, TABLE, mode="median"), "sum, mean or max"),
        (lambda: torch.cdist(X, X[:, :2]), "same number of columns"),
    ],
)
def test_invalid_arguments_get_the_message_of_torch(call: Callable[[], Any], message: str) -> None:
    with Rewrites(), pytest.raises(Exception, match=message):
        call()


@pytest.mark.parametrize("op", [F.mse_loss, F.huber_loss])
def test_a_formula_warns_as_torch_does_of_sizes_that_broadcast(op: Op) -> None:
    with Rewrites(), pytest.warns(UserWarning, match="different to the input size"):
        op(X, X[:, :1])


def misused() -> Iterator[tuple[Op, Any, Any]]:
    if HAS_CHUNKS:
        options = nn.LinearCrossEntropyOptions()
        yield F.linear_cross_entropy, (X, X[:, :5], LABELS), {"options": options}
        yield F.linear_cross_entropy, (X, T, LABELS + 9), {"options": options}


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (F.multi_margin_loss, (X, LABELS + 9), {}),
        (F.multi_margin_loss, (X, LABELS.double()), {}),
        (F.multi_margin_loss, (X, LABELS), {"weight": X[0, :2]}),
        (F.multilabel_margin_loss, (X[:0, :0], LABEL_SETS[:0, :0]), {}),
        *misused(),
        (torch.linalg.svdvals, (X[0],), {}),
        (torch.linalg.matrix_norm, (X, "nuclear"), {}),
        (torch.linalg.matrix_norm, (X, "nuc", (0, 0)), {}),
        (torch.linalg.norm, (X, 2, (0, 1, 2)), {}),
        (torch.linalg.cond, (X, "no"), {}),
        (torch.linalg.eigvalsh, (X,), {}),
        (torch.linalg.eigh, (X[:, :4], "B"), {}),
        (torch.norm, (X[0], "nuc"), {}),
        (torch.logaddexp, (X, T[:, :2]), {}),
        (torch.sinc, (X,), {"out": X[0]}),
        (torch.cdist, (X, T, -1.0), {}),
        (torch.native_layer_norm, (X, [6], None, T[0, :2], 1e-5), {}),
        (torch.linalg.svdvals, (), {}),
    ],
)
def test_wrong_arguments_get_the_error_of_torch(op: Op, args: Any, kwargs: Any) -> None:
    args = [*(a.clone().requires_grad_() for a in args[:1]), *args[1:]]
    with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever it is)
        op(*args, **kwargs)
    with Rewrites(), pytest.raises(expected.type) as ours:
        op(*args, **kwargs)
    assert str(ours.value) == str(expected.value)


def test_values_that_are_equal_and_told_apart_have_no_second_derivative() -> None:
    a = orthogonal(4, 4)
    low = with_values(2, 1, 0, 0)
    for op, x in (
        (lambda a: torch.linalg.matrix_norm(a, 2), a),
        (lambda a: torch.linalg.cond(a), a),
        (lambda a: torch.linalg.svdvals(a)[1], a),
        (lambda a: torch.linalg.matrix_norm(a, "nuc"), low),
    ):
        x = x.clone().requires_grad_()
        with Rewrites():
            y = op(x)
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        assert gradient.isfinite().all()
        (product,) = torch.autograd.grad(gradient, x, randn(4, 4, seed=5))
        assert not product.isfinite().all()


def test_the_nuclear_norm_of_an_orthogonal_matrix_curves_with_the_skew_part() -> None:
    # |Q + E|_* has the gradient U V' = (Q + E) ((Q + E)' (Q + E))^(-1/2), which is Q + Q (A - A') / 2
    # to first order in A = Q' E.
    q, e = orthogonal(5, 5).requires_grad_(), randn(5, 5, seed=3)
    with Rewrites():
        norm = torch.linalg.matrix_norm(q, "nuc")
    (gradient,) = torch.autograd.grad(norm, q, create_graph=True)
    (product,) = torch.autograd.grad(gradient, q, e)
    a = q.detach().mT @ e
    torch.testing.assert_close(product, q.detach() @ (a - a.mT) / 2, rtol=0, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:.*size_average.*")
def test_the_older_arguments_of_losses_count() -> None:
    for op in (F.mse_loss, F.soft_margin_loss):
        for old in ({"size_average": False}, {"reduce": False}, {"size_average": True}):
            with Rewrites():
                ours = op(X, T.sign(), **old)
            torch.testing.assert_close(ours, op(X, T.sign(), **old), rtol=ROUNDING, atol=0)
