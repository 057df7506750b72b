"""Models of 3 to 30 million parameters, written for the purpose, each with two batches of data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Decoder, Layer, Workload


def resnet(batches: int = 2, samples: int = 4) -> Workload:
    """ResNet-18 (He et al. 2016) on 32x32 images, with BatchNorm in eval mode: 11 M."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    before = 64
    for channels in (64, 128, 256, 512):
        stride = 1 if channels == 64 else 2
        blocks += [Block(before, channels, stride), Block(channels, channels, 1)]
        before = channels
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    data = [
        (torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,))) for _ in range(batches)
    ]
    with torch.no_grad():  # running statistics that are not those of the start
        for x, _ in data:
            model(x)
    title = f"ResNet-18, {batches} x {samples}"
    return Workload("resnet", title, model.eval(), nn.CrossEntropyLoss(), data)


def gpt(batches: int = 2, samples: int = 1) -> Workload:
    """A decoder of 8 layers, width 512, on 128 tokens from a vocabulary of 5,000: 30 M."""
    torch.manual_seed(0)
    model = Decoder(vocabulary=5000, tokens=128, width=512, layers=8, heads=8)
    data = []
    for _ in range(batches):
        text = torch.randint(5000, (samples, 129))
        data.append((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return Workload(
        "gpt", f"8 x 512 decoder, {batches} x {samples} x 128", model, nn.CrossEntropyLoss(), data
    )


def vit(batches: int = 2, samples: int = 8) -> Workload:
    """A vision transformer of 7 layers, width 192, on 32x32 images in patches of 4: 3 M."""
    torch.manual_seed(0)
    model = Transformer(width=192, layers=7, heads=3)
    data = [
        (torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,))) for _ in range(batches)
    ]
    return Workload(
        "vit", f"7 x 192 ViT, {batches} x {samples}", model, nn.CrossEntropyLoss(), data
    )


def lstm(batches: int = 2, samples: int = 16) -> Workload:
    """Two LSTM layers of 512 on 32 tokens from a vocabulary of 1,000: 5 M."""
    torch.manual_seed(0)
    model = Recurrent(vocabulary=1000, width=512)
    data = []
    for _ in range(batches):
        text = torch.randint(1000, (samples, 33))
        data.append((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return Workload(
        "lstm", f"2 x 512 LSTM, {batches} x {samples} x 32", model, nn.CrossEntropyLoss(), data
    )


LARGE: dict[str, Callable[[], Workload]] = {"resnet": resnet, "gpt": gpt, "vit": vit, "lstm": lstm}


class Block(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Transformer(nn.Module):
    """Patches as tokens, and the mean of what comes out (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.place = nn.Parameter(torch.randn(64, width) / math.sqrt(width))
        self.layers = nn.Sequential(*(Layer(width, heads, 64) for _ in range(layers)))
        for layer in self.layers:
            layer.future.zero_()  # every patch sees all
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.layers(tokens)).mean(1))


class Recurrent(nn.Module):
    """A language model; logits come as ``(batch, vocabulary, tokens)``."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.layers = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.layers(self.token(x))
        return self.head(h).transpose(1, 2)
