"""Cases: linear, convolution, pooling, padding, embedding and resampling layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import SIZES, Apply, after, regression, through, tokens
from .registry import Problem, case

Make = Callable[[], nn.Module]

OWN: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear_without_bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear_on_sequences": (lambda: nn.Linear(4, 3), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 3, 3, 3)),
    "conv2d_strided_dilated": (lambda: nn.Conv2d(2, 3, 2, stride=2, dilation=2), (2, 6, 6)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 4, 4)),
    "conv2d_depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (3, 4, 4)),
    "conv2d_same": (lambda: nn.Conv2d(2, 2, 3, padding="same"), (2, 4, 4)),
    "conv1d_circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5)),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv2d_replicate": (
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
        (2, 4, 4),
    ),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 4)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1),
        (2, 3, 3),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 1, 2), (2, 2, 2, 2)),
    "conv_then_shuffle": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2)), (2, 3, 3)),
}

BEHIND: dict[str, tuple[Make, int]] = {
    "max_pool1d": (lambda: nn.MaxPool1d(2), 1),
    "max_pool2d": (lambda: nn.MaxPool2d(2, padding=1), 2),
    "max_pool3d": (lambda: nn.MaxPool3d(2), 3),
    "max_pool2d_dilated_ceil": (lambda: nn.MaxPool2d(2, dilation=2, ceil_mode=True), 2),
    "avg_pool1d": (lambda: nn.AvgPool1d(2), 1),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), 2),
    "avg_pool3d": (lambda: nn.AvgPool3d(2), 3),
    "lp_pool1d": (lambda: nn.Sequential(Apply(torch.exp), nn.LPPool1d(3, 2)), 1),
    "lp_pool2d": (lambda: nn.Sequential(Apply(torch.exp), nn.LPPool2d(2, 2)), 2),
    "adaptive_avg_pool1d": (lambda: nn.AdaptiveAvgPool1d(3), 1),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d((2, 3)), 2),
    "adaptive_avg_pool3d": (lambda: nn.AdaptiveAvgPool3d(2), 3),
    "adaptive_max_pool1d": (lambda: nn.AdaptiveMaxPool1d(2), 1),
    "adaptive_max_pool2d": (lambda: nn.AdaptiveMaxPool2d((3, 2)), 2),
    "adaptive_max_pool3d": (lambda: nn.AdaptiveMaxPool3d(2), 3),
    "zero_pad2d": (lambda: nn.ZeroPad2d(1), 2),
    "constant_pad1d": (lambda: nn.ConstantPad1d(2, 0.5), 1),
    "reflection_pad1d": (lambda: nn.ReflectionPad1d(2), 1),
    "reflection_pad2d": (lambda: nn.ReflectionPad2d((1, 2, 0, 1)), 2),
    "reflection_pad3d": (lambda: nn.ReflectionPad3d(1), 3),
    "replication_pad1d": (lambda: nn.ReplicationPad1d(2), 1),
    "replication_pad2d": (lambda: nn.ReplicationPad2d(1), 2),
    "replication_pad3d": (lambda: nn.ReplicationPad3d(1), 3),
    "circular_pad2d": (lambda: nn.CircularPad2d(1), 2),
    "upsample_nearest": (lambda: nn.Upsample(scale_factor=2), 1),
    "upsample_nearest_exact": (lambda: nn.Upsample(size=(5, 3), mode="nearest-exact"), 2),
    "upsample_linear": (lambda: nn.Upsample(scale_factor=2, mode="linear"), 1),
    "upsample_bilinear": (lambda: nn.Upsample(size=(5, 6), mode="bilinear"), 2),
    "upsample_bilinear_aligned": (
        lambda: nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),
        2,
    ),
    "upsample_bicubic": (lambda: nn.Upsample(size=(5, 6), mode="bicubic"), 2),
    "upsample_trilinear": (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), 3),
    "interpolate_antialiased": (
        lambda: Apply(lambda x: F.interpolate(x, size=(2, 2), mode="bilinear", antialias=True)),
        2,
    ),
    "pixel_unshuffle": (lambda: nn.PixelUnshuffle(2), 2),
    "channel_shuffle": (lambda: nn.ChannelShuffle(3), 2),
    "unfold": (lambda: nn.Unfold(2), 2),
    "unfold_and_fold": (lambda: nn.Sequential(nn.Unfold(2), nn.Fold((4, 4), 2)), 2),
    "unflatten": (lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (6, -1))), 2),
    "identity": (lambda: nn.Identity(), 1),
}
SPACE = {1: (2, 6), 2: (2, 4, 4), 3: (2, 2, 2, 2)}

for _name, (_make, _shape) in OWN.items():
    case(_name)(partial(through, _make, *_shape))
for _name, (_make, _dims) in BEHIND.items():
    case(_name)(partial(after, _make, *SPACE[_dims]))


@case("bilinear")
def bilinear() -> Problem:
    class Pairing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairing = nn.Bilinear(3, 2, 2)
            self.left = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = x.split([3, 2], dim=1)
            return self.pairing(torch.tanh(self.left(left)), right)

    return Problem(Pairing(), regression(5), nn.MSELoss())


@case("max_unpool2d")
def max_unpool2d() -> Problem:
    class Unpool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.pool = nn.MaxPool2d(2, return_indices=True)
            self.unpool = nn.MaxUnpool2d(2)
            self.head = nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            pooled, places = self.pool(torch.tanh(self.conv(x)))
            return self.head(self.unpool(pooled**2, places).flatten(1))

    return Problem(Unpool(), regression(2, 4, 4), nn.MSELoss())


def embedded(make: Make, bag: bool = False) -> Problem:
    """Return a classification of tokens through an embedding and a hidden layer."""
    pool: nn.Module = nn.Identity() if bag else nn.Flatten()
    model = nn.Sequential(make(), pool, nn.Tanh(), nn.LazyLinear(3))
    data = tokens()
    model(data[0][0])
    return Problem(model, data, nn.CrossEntropyLoss())


EMBEDDINGS: dict[str, Make] = {
    "embedding": lambda: nn.Embedding(7, 2),
    "embedding_sparse": lambda: nn.Embedding(7, 2, sparse=True),
    "embedding_max_norm_inactive": lambda: nn.Embedding(7, 2, max_norm=1e3),
}
BAGS: dict[str, Make] = {
    "embedding_bag_mean": lambda: nn.EmbeddingBag(7, 3, mode="mean"),
    "embedding_bag_sum": lambda: nn.EmbeddingBag(7, 3, mode="sum"),
    "embedding_bag_max": lambda: nn.EmbeddingBag(7, 3, mode="max"),
    "embedding_bag_sparse": lambda: nn.EmbeddingBag(7, 3, mode="sum", sparse=True),
}
for _name, _make in EMBEDDINGS.items():
    case(_name)(partial(embedded, _make))
for _name, _make in BAGS.items():
    case(_name)(partial(embedded, _make, bag=True))

case("embedding_scaled_by_frequency", symmetric=False)(
    partial(embedded, lambda: nn.Embedding(7, 2, scale_grad_by_freq=True))
)
# The gradient of the padding row is zero by definition: not the derivative of the loss.
case("embedding_padding_idx", reference="double backward")(
    partial(embedded, lambda: nn.Embedding(7, 2, padding_idx=0))
)
case("embedding_bag_padding_idx")(
    # Padded entries are left out of the bag, so here the gradient is the derivative.
    partial(embedded, lambda: nn.EmbeddingBag(7, 3, mode="mean", padding_idx=0), bag=True)
)


@case("embedding_max_norm_active", reference="double backward")
def embedding_max_norm_active() -> Problem:
    """The forward scales the weights down in place: a step that gradients do not see."""
    problem = embedded(lambda: nn.Embedding(7, 2, max_norm=0.5))
    with torch.no_grad():
        problem.model[0].weight.mul_(3.0)
    return problem


@case("embedding_bag_offsets_and_weights")
def embedding_bag_offsets_and_weights() -> Problem:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(7, 3, mode="sum")
            self.importance = nn.Parameter(torch.rand(5))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            offsets = torch.arange(0, x.numel(), x.shape[1])
            scale = self.importance.repeat(x.shape[0])
            bags = self.bag(x.reshape(-1), offsets, per_sample_weights=scale)
            return self.head(torch.tanh(bags))

    data = [(torch.randint(7, (b, 5)), torch.randn(b, 2)) for b in SIZES]
    return Problem(Bag(), data, nn.MSELoss())


@case("fractional_max_pool2d", reference="laws")
def fractional_max_pool2d() -> Problem:
    return after(lambda: nn.FractionalMaxPool2d(2, output_size=2), 2, 4, 4)


@case("convolutional_autoencoder")
def convolutional_autoencoder() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1, output_padding=1),
        nn.Sigmoid(),
    )
    images = [torch.rand(b, 1, 4, 4) for b in SIZES]
    return Problem(model, [(x, x) for x in images], nn.BCELoss())


@case("residual_block")
def residual_block() -> Problem:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(F.gelu(self.first(x)))

    return through(Residual, 2, 3, 3)


@case("squeeze_and_excite")
def squeeze_and_excite() -> Problem:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(2, 3, 1), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            scale = F.hardsigmoid(self.gate(y.mean(dim=(2, 3))))
            return F.hardswish(y) * scale[:, :, None, None]

    return through(Gate, 2, 3, 3)
