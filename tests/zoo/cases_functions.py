"""Cases: tensor functions inside a model: algebra, elementwise, shapes and indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import Apply, is_twice_differentiable, least_squares
from .registry import Problem, case

Map = Callable[[Tensor], Tensor]
EYE = torch.eye(3, dtype=torch.float64)


def positive(x: Tensor) -> Tensor:
    """Return positive definite matrices (b, 3, 3) of the features (b, 9)."""
    a = x.view(-1, 3, 3)
    return a @ a.mT + EYE


def near_identity(x: Tensor) -> Tensor:
    """Return well conditioned matrices (b, 3, 3) of the features (b, 9)."""
    return 2 * EYE + 0.3 * x.view(-1, 3, 3)


def spread(x: Tensor) -> Tensor:
    """Return symmetric matrices (b, 3, 3) with well separated eigenvalues."""
    a = 0.2 * x.view(-1, 3, 3)
    return a + a.mT + torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=x.dtype))


def cholesky(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(positive(x))


def qr(x: Tensor) -> Tensor:
    q, r = torch.linalg.qr(near_identity(x))
    return torch.cat([q, r], dim=1)


def svd(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(spread(x) + 0.1 * x.view(-1, 3, 3), full_matrices=False)
    return (u * s.log().unsqueeze(-2)) @ vh


def eigh(x: Tensor) -> Tensor:
    values, q = torch.linalg.eigh(spread(x))
    return (q * values.sin().unsqueeze(-2)) @ q.mT


ALGEBRA: dict[str, Map] = {
    "linalg_solve": lambda x: torch.linalg.solve(near_identity(x), x.view(-1, 3, 3)),
    "linalg_inv": lambda x: torch.linalg.inv(near_identity(x)),
    "linalg_det": lambda x: torch.linalg.det(near_identity(x)),
    "linalg_slogdet": lambda x: torch.linalg.slogdet(near_identity(x))[1],
    "logdet": lambda x: torch.logdet(positive(x)),
    "linalg_cholesky": cholesky,
    "linalg_solve_triangular": lambda x: torch.linalg.solve_triangular(
        cholesky(x), x.view(-1, 3, 3), upper=False
    ),
    "cholesky_solve": lambda x: torch.cholesky_solve(x.view(-1, 3, 3), cholesky(x)),
    "linalg_lstsq_by_normal_equations": lambda x: torch.linalg.solve(positive(x), x[:, :3]),
    "linalg_qr": qr,
    "linalg_svd": svd,
    "linalg_svdvals": lambda x: torch.linalg.svdvals(spread(x)),
    "linalg_eigh": eigh,
    "linalg_eigvals": lambda x: torch.linalg.eigvals(spread(x) + 0.1 * x.view(-1, 3, 3)).abs(),
    "linalg_lstsq": lambda x: torch.linalg.lstsq(near_identity(x), x.view(-1, 3, 3)).solution,
    "lu_factor": lambda x: torch.linalg.lu_factor(near_identity(x))[0],
    "multi_dot": lambda x: torch.linalg.multi_dot([x.T, x, x.T]).T,
    "baddbmm": lambda x: torch.baddbmm(*[x.view(-1, 3, 3)] * 3),
    "linalg_eigvalsh": lambda x: torch.linalg.eigvalsh(spread(x)),
    "linalg_pinv": lambda x: torch.linalg.pinv(near_identity(x)),
    "matrix_exp": lambda x: torch.matrix_exp(0.5 * x.view(-1, 3, 3)),
    "matrix_power": lambda x: torch.linalg.matrix_power(x.view(-1, 3, 3), 3),
    "nuclear_norm": lambda x: torch.linalg.matrix_norm(spread(x), "nuc"),
    "cdist": lambda x: torch.cdist(x.view(-1, 3, 3), 1 + x.view(-1, 3, 3).square()),
    "cdist_l1": lambda x: torch.cdist(x.view(-1, 3, 3).exp(), -x.view(-1, 3, 3).exp(), p=1.0),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(1) + 1),
    "pdist": lambda x: F.pdist(torch.cat([x[:, :4], 2 + x[:, 5:]])).mean() * x,
    "cosine_similarity": lambda x: F.cosine_similarity(x[:, :4], x[:, 4:8]),
    "einsum": lambda x: torch.einsum("bij,bjk,bki->b", *[x.view(-1, 3, 3)] * 3),
    "einsum_outer": lambda x: torch.einsum("bi,bj,bk->bijk", x[:, :2], x[:, 2:4], x[:, 4:6]),
    "fft": lambda x: torch.view_as_real(torch.fft.fft(x)),
    "rfft_filter": lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2, n=9),
    "stft": lambda x: torch.stft(
        x.repeat(1, 2), 4, hop_length=2, window=torch.ones_like(x[0, :4]), return_complex=True
    ).abs(),
    "complex_polar": lambda x: torch.view_as_real(torch.polar(x[:, :4].exp(), x[:, 4:8])),
    "kronecker": lambda x: torch.stack([torch.kron(r[:3], r[3:6]) for r in x]),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([0], [0])).sum() * x.sin(),
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 3:6]),
}
ELEMENTWISE: dict[str, Map] = {
    "powers": lambda x: x.abs().add(1).pow(2.5) + x.pow(3),
    "exponent_is_learned": lambda x: x[:, :4].exp() ** x[:, 4:8],
    "erf": torch.erf,
    "lgamma": lambda x: torch.lgamma(x.exp() + 0.5),
    "digamma": lambda x: torch.digamma(x.exp() + 0.5),
    "xlogy": lambda x: torch.xlogy(x[:, :4].exp(), x[:, 4:8].exp()),
    "logit": lambda x: torch.logit(x.sigmoid()),
    "sinc": lambda x: torch.sinc(x),
    "bessel": lambda x: torch.special.i0e(x + 3),
    "atan2": lambda x: torch.atan2(x[:, :4], x[:, 4:8].exp()),
    "hypot": lambda x: torch.hypot(x[:, :4], x[:, 4:8] + 2),
    "logaddexp": lambda x: torch.logaddexp(x[:, :4], x[:, 4:8]),
    "log_cumsum_exp": lambda x: torch.logcumsumexp(x, 1),
    "cumprod": lambda x: torch.cumprod(x + 2, 1),
    "prod": lambda x: x.prod(1),
    "var": lambda x: x.var(1),
    "norm": lambda x: x.norm(dim=1),
    "norm_p3": lambda x: torch.linalg.vector_norm(x.exp(), 3, dim=1),
    "renorm": lambda x: torch.renorm(x, 2, 0, 0.5),
    "round_is_flat": lambda x: x * (10 * x).round(),
    "remainder": lambda x: torch.remainder(x, 0.7) * x,
    "where": lambda x: torch.where(x > 0, x.sin(), x.square()),
    "maximum": lambda x: torch.maximum(x[:, :4].sin(), x[:, 4:8] ** 2),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.5),
    "lerp": lambda x: torch.lerp(x[:, :3], x[:, 3:6], x[:, 6:9].sigmoid()),
    "trapezoid": lambda x: torch.trapezoid(x.sin(), x.exp().cumsum(1), dim=1),
    "normal_cdf": lambda x: torch.special.ndtr(x),
    "log_normal_cdf": lambda x: torch.special.log_ndtr(x),
    "incomplete_gamma": lambda x: torch.special.gammainc(torch.full_like(x, 1.5), x.exp()),
    "bessel_i1": torch.special.i1,
    "smooth_l1_elements": lambda x: F.smooth_l1_loss(x, x.sin(), reduction="none"),
    "rrelu_of_one_slope": lambda x: F.rrelu(x, 0.2, 0.2),
    "polygamma": lambda x: torch.polygamma(1, x.exp() + 1),
}


def scatter_add(x: Tensor) -> Tensor:
    index = torch.arange(9).remainder(4).expand(len(x), -1)
    return x.new_zeros(len(x), 4).scatter_add(1, index, x.sin())


def scatter_reduce(how: str) -> Map:
    def reduce(x: Tensor) -> Tensor:
        index = torch.arange(9).remainder(3).expand(len(x), -1)
        return x.new_ones(len(x), 3).scatter_reduce(1, index, x + 2, how)

    return reduce


def slices(x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 6)
    out[:, :3] = x[:, :3].sin()
    out[:, 3:] = x[:, 3:6] * out[:, :3].clone()
    out[:, 0] += x[:, 8]
    return out


def in_place(x: Tensor) -> Tensor:
    y = x.sin()
    y.mul_(x).add_(1.0)
    y[:, 0].clamp_(max=1.2)
    y.exp_()
    return y


def sample_bilinearly(x: Tensor) -> Tensor:
    image = x.view(-1, 1, 3, 3).sin()
    places = 0.5 * torch.tanh(x[:, :8]).view(-1, 2, 2, 2)
    return F.grid_sample(image, places, align_corners=False)


def affine_grid(x: Tensor) -> Tensor:
    grid = F.affine_grid(
        0.4 * x[:, :6].tanh().view(-1, 2, 3), [len(x), 1, 2, 2], align_corners=True
    )
    return F.grid_sample(x.view(-1, 1, 3, 3), grid, align_corners=True, padding_mode="border")


SHAPES: dict[str, Map] = {
    "gather": lambda x: x.gather(1, x.detach().argsort(1)) * x,
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 0, 3, 8])) ** 2,
    "index_add": lambda x: x.index_add(1, torch.tensor([1, 1]), x[:, 4:6] ** 2),
    "index_put": lambda x: x.index_put(
        (torch.arange(len(x)), torch.arange(len(x))), x[:, 0].exp(), accumulate=True
    ),
    "masked_select": lambda x: x * x[x > 0].square().sum(),
    "masked_fill": lambda x: x.square().masked_fill(x < 0, 0.3),
    "scatter_add": scatter_add,
    "scatter_amax": scatter_reduce("amax"),
    "scatter_mean": scatter_reduce("mean"),
    "scatter_prod": scatter_reduce("prod"),
    "sort": lambda x: x.sort(1).values * torch.arange(9) * x,
    "topk": lambda x: x.topk(3, 1).values ** 2,
    "median": lambda x: x.median(1).values * x.sum(1),
    "kthvalue": lambda x: x.kthvalue(3, 1).values.exp(),
    "cummax": lambda x: x.cummax(1).values * x,
    "amin": lambda x: x.amin(1).exp(),
    "to_sparse_and_back": lambda x: (x * x).to_sparse().to_dense(),
    "max_with_indices": lambda x: x.max(1).values.exp(),
    "flip_roll_cat": lambda x: torch.cat([x.flip(1) * x, x.roll(2, 1)], 1),
    "as_strided": lambda x: x.contiguous().as_strided((len(x), 4, 3), (9, 2, 1)).square(),
    "unfold_tensor": lambda x: x.unfold(1, 3, 2).prod(-1),
    "tril": lambda x: x.view(-1, 3, 3).tril() @ x.view(-1, 3, 3).triu(),
    "diag_embed": lambda x: torch.diag_embed(x[:, :3].exp()) @ x.view(-1, 3, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1).cumsum(1).sin(),
    "expanded_result": lambda x: x.sum(1, keepdim=True).square().expand(-1, 4),
    "slice_assignment": slices,
    "in_place_operations": in_place,
    "user_vmap": lambda x: torch.func.vmap(lambda row: torch.outer(row, row.sin()))(x),
    "user_checkpointed_lambda": lambda x: torch.utils.checkpoint.checkpoint(
        lambda y: y.sin() * y, x, use_reentrant=False
    ),
}


SAMPLES: dict[str, Map] = {
    "grid_sample_3d": lambda x: F.grid_sample(
        x[:, :8].reshape(-1, 1, 2, 2, 2),
        0.5 * x[:, :3].tanh().view(-1, 1, 1, 1, 3),
        align_corners=False,
    ),
    "grid_sample_bicubic": lambda x: F.grid_sample(
        x.view(-1, 1, 3, 3), 0.5 * x[:, :8].tanh().view(-1, 2, 2, 2), "bicubic", align_corners=False
    ),
    "grid_sample": sample_bilinearly,
    "affine_grid": affine_grid,
}


def between(function: Map) -> Problem:
    """Return a regression with the function between a linear layer and a smooth head."""

    def rows(x: Tensor) -> Tensor:
        return function(x).reshape(len(x), -1)

    body = nn.Sequential(nn.Linear(4, 9), Apply(rows), nn.Tanh())
    return least_squares(body, 4)


for _name, _function in (ALGEBRA | ELEMENTWISE | SHAPES).items():
    case(_name)(lambda function=_function: between(function))


def segments(x: Tensor) -> Tensor:
    lengths = torch.tensor([4, 5])
    return torch.segment_reduce(x.T.contiguous(), "mean", lengths=lengths, axis=0).T


# No double backward, no rewrite: differences of gradients, announced.
BY_DIFFERENCES: dict[str, Any] = {
    "warns": "no double backward",
    "tolerance": 1e-6,
    "agreement": 1e-6,
}

case("segment_reduce", **BY_DIFFERENCES)(lambda: between(segments))

for _name, _function in SAMPLES.items():
    case(_name, **{} if is_twice_differentiable(_function) else BY_DIFFERENCES)(
        lambda function=_function: between(function)
    )


@torch.compile(backend="aot_eager")
def compiled(x: Tensor) -> Tensor:
    return x.sin() * x


case("compiled_function_inside")(lambda: between(compiled))


def quantized(x: Tensor) -> Tensor:
    return x * torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).double()


case("fake_quantized", reference="double backward", agreement=1e-6)(lambda: between(quantized))
