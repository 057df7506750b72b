"""Cases: normalisation of activations, in both modes, and of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torch.nn.utils as utils
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .ingredients import Apply, least_squares, mlp, regression
from .registry import Problem, case

Make = Callable[[], nn.Module]

VECTORS: dict[str, Make] = {
    "layer_norm": lambda: nn.LayerNorm(5),
    "layer_norm_plain": lambda: nn.LayerNorm(5, elementwise_affine=False),
    "layer_norm_without_bias": lambda: nn.LayerNorm(5, bias=False),
    "rms_norm": lambda: nn.RMSNorm(5),
    "rms_norm_eps": lambda: nn.RMSNorm(5, eps=1e-2, elementwise_affine=False),
    "batch_norm1d_train": lambda: nn.BatchNorm1d(5),
    "batch_norm1d_plain_train": lambda: nn.BatchNorm1d(5, affine=False),
    "batch_norm1d_without_statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "batch_norm1d_without_statistics_eval": lambda: nn.BatchNorm1d(
        5, track_running_stats=False
    ).eval(),
    "batch_norm1d_cumulative": lambda: nn.BatchNorm1d(5, momentum=None),
    "normalize": lambda: Apply(lambda x: F.normalize(x, dim=1)),
    "standardize_by_hand": lambda: Apply(
        lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    ),
}
IMAGES: dict[str, Make] = {
    "batch_norm2d_train": lambda: nn.BatchNorm2d(4),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "group_norm_plain": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance_norm2d": lambda: nn.InstanceNorm2d(4),
    "instance_norm2d_affine": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance_norm2d_statistics_train": lambda: nn.InstanceNorm2d(
        4, affine=True, track_running_stats=True
    ),
    "instance_norm2d_statistics_eval": lambda: nn.InstanceNorm2d(
        4, affine=True, track_running_stats=True
    ).eval(),
    "local_response_norm": lambda: nn.LocalResponseNorm(3),
    "layer_norm_images": lambda: nn.LayerNorm([4, 3, 3]),
    "channels_last_layer_norm": lambda: nn.Sequential(
        Apply(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(4)
    ),
}


def in_vectors(make: Make) -> Problem:
    """Return a regression with the norm between a linear layer and a tanh."""
    return least_squares(shaken(nn.Sequential(nn.Linear(4, 5), make(), nn.Tanh())), 4)


def in_images(make: Make) -> Problem:
    """Return a regression with the norm behind a convolution."""
    return least_squares(shaken(nn.Sequential(nn.Conv2d(2, 4, 2), make(), nn.Tanh())), 2, 4, 4)


def shaken(model: nn.Sequential) -> nn.Sequential:
    """Move scales off one and running statistics off their start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.5 * torch.rand_like(buffer))
    return model


def evaluated(make: Make) -> nn.Module:
    return make().eval()


for _name, _make in VECTORS.items():
    case(_name)(partial(in_vectors, _make))
for _name, _make in IMAGES.items():
    case(_name)(partial(in_images, _make))
case("batch_norm1d_eval")(partial(in_vectors, partial(evaluated, lambda: nn.BatchNorm1d(5))))
case("batch_norm2d_eval")(partial(in_images, partial(evaluated, lambda: nn.BatchNorm2d(4))))
case("sync_batch_norm_eval")(partial(in_images, partial(evaluated, lambda: nn.SyncBatchNorm(4))))


def normalised(norm: Callable[[nn.Module], nn.Module], training: bool = True) -> Problem:
    """Return a regression whose first layer has a normalised weight."""
    model = mlp(4, 5, 2)
    model[0] = norm(model[0])
    if isinstance(model[0], nn.Linear):
        model(torch.randn(3, 4))  # a first power iteration
    return Problem(model.train(training), regression(4), nn.MSELoss())


WEIGHT_NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm_hook": lambda layer: utils.weight_norm(layer),
    "weight_norm_hook_whole": lambda layer: utils.weight_norm(layer, dim=None),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "weight_norm_columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight_norm_whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral_norm_hook_eval": lambda layer: utils.spectral_norm(layer),
    "spectral_norm_eval": lambda layer: parametrizations.spectral_norm(layer),
}
for _name, _norm in WEIGHT_NORMS.items():
    case(_name)(partial(normalised, _norm, training=False))

# In training mode the singular vectors come from a power iteration under no_grad.
case("spectral_norm_hook_train", reference="double backward")(
    partial(normalised, WEIGHT_NORMS["spectral_norm_hook_eval"])
)
case("spectral_norm_train", reference="double backward")(
    partial(normalised, WEIGHT_NORMS["spectral_norm_eval"])
)


@case("weight_norm_conv")
def weight_norm_conv() -> Problem:
    conv = parametrizations.weight_norm(nn.Conv1d(2, 3, 3))
    return least_squares(nn.Sequential(conv, nn.Tanh()), 2, 5)


@case("weight_norm_lstm")
def weight_norm_lstm() -> Problem:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, 3, batch_first=True)
            parametrizations.weight_norm(self.lstm, "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    return least_squares(Reader(), 3, 2)


@case("weight_standardisation")
def weight_standardisation() -> Problem:
    class Standardised(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)

    def norm(layer: nn.Module) -> nn.Module:
        return parametrize.register_parametrization(layer, "weight", Standardised())

    return normalised(norm, training=False)


# Householder's vectors sit under a diagonal of signs that a cast to integers keeps constant.
@case("orthogonal", reference="double backward")
def orthogonal() -> Problem:
    return normalised(lambda layer: parametrizations.orthogonal(layer), training=False)


MAPS = {"matrix_exp": "difference", "cayley": "difference", "householder": "double backward"}
for _map, _reference in MAPS.items():

    @case(f"orthogonal_{_map}", reference=_reference)
    def orthogonal_map(orthogonal_map: str = _map) -> Problem:
        model = mlp(4, 4, 2)
        parametrizations.orthogonal(model[0], orthogonal_map=orthogonal_map)
        return Problem(model, regression(4), nn.MSELoss())


@case("symmetric_parametrization")
def symmetric_parametrization() -> Problem:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).mT

    model = mlp(4, 4, 2)
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return Problem(model, regression(4), nn.MSELoss())


@case("chained_parametrizations")
def chained_parametrizations() -> Problem:
    class Positive(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return F.softplus(w)

    class Rows(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / w.sum(1, keepdim=True)

    model = mlp(4, 5, 2)
    parametrize.register_parametrization(model[0], "weight", Positive())
    parametrize.register_parametrization(model[0], "weight", Rows())
    parametrize.register_parametrization(model[2], "bias", Positive())
    return Problem(model, regression(4), nn.MSELoss())


@case("pruned")
def pruned() -> Problem:
    from torch.nn.utils import prune

    model = mlp(4, 5, 2)
    prune.random_unstructured(model[0], "weight", amount=0.4)
    return Problem(model, regression(4), nn.MSELoss())
