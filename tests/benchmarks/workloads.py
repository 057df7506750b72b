"""The workloads: model, loss, data and seeds, small enough for one core."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model with its loss and data."""

    name: str
    title: str
    model: nn.Module
    loss: nn.Module
    data: Iterable[Batch]  # of any number of passes

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def fresh(self) -> nn.Module:
        """A copy of the model: some libraries change the one they are given."""
        return copy.deepcopy(self.model)

    def vectors(self, k: int | None = None) -> Tensor:
        """A random vector ``(n,)``, or k of them ``(n, k)``; the same every time."""
        shape = (self.parameters,) if k is None else (self.parameters, k)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tiny(batches: int = 8) -> Workload:
    """Bookkeeping, not arithmetic."""
    model = _mlp(64, 32, 10)
    data = _classified(batches, 128, (64,), 10)
    return Workload("tiny", f"64-32-10 tanh, {batches} x 128", model, nn.CrossEntropyLoss(), data)


def mlp(batches: int = 4, width: int = 512) -> Workload:
    """Dense layers that are large enough for their matrix products to count."""
    model = _mlp(784, width, width, 10)
    data = _classified(batches, 256, (784,), 10)
    title = f"784-{width}-{width}-10 tanh, {batches} x 256"
    return Workload("mlp", title, model, nn.CrossEntropyLoss(), data)


def cnn(batches: int = 2) -> Workload:
    """Three residual blocks with GroupNorm, 16-32-64 channels, on 32x32 images."""
    with _seeded():
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            Residual(16, 16, 1),
            Residual(16, 32, 2),
            Residual(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
    data = _classified(batches, 32, (3, 32, 32), 10)
    return Workload(
        "cnn", f"residual GroupNorm, {batches} x 32", model, nn.CrossEntropyLoss(), data
    )


def gpt(batches: int = 2) -> Workload:
    """A decoder of 3 layers, width 128, on 64 tokens from a vocabulary of 512."""
    with _seeded():
        model = Decoder(vocabulary=512, tokens=64, width=128, layers=3, heads=4)
    generator = torch.Generator().manual_seed(2)
    data = []
    for _ in range(batches):
        text = torch.randint(512, (8, 65), generator=generator)
        data.append((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return Workload(
        "gpt", f"3 x 128 decoder, {batches} x 8 x 64", model, nn.CrossEntropyLoss(), data
    )


def digits() -> Workload:
    """A trained 64-32-10 network on 1,797 digits: 15 batches of 128, the last of 5."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    model, loss = _mlp(64, 32, 10), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    data = DataLoader(TensorDataset(x, y), batch_size=128)
    return Workload("digits", "64-32-10 on 1,797 digits, 14 x 128 + 5", model, loss, data)


def memory() -> Workload:
    """The convolutional network on more data: graphs of 8 batches, of which half may be kept."""
    workload = cnn(batches=8)
    return Workload("memory", workload.title, workload.model, workload.loss, workload.data)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "tiny": tiny,
    "mlp": mlp,
    "cnn": cnn,
    "gpt": gpt,
    "digits": digits,
    "memory": memory,
}


# -- what is true, and what it costs at least ------------------------------------------------------


def in_float64(workload: Workload) -> tuple[nn.Module, list[Batch]]:
    """Model and data in double precision."""
    data = [(x.double() if x.is_floating_point() else x, y) for x, y in workload.data]
    return workload.fresh().double(), data


Map = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def hessian(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Map:
    """That of a batch, by double backward."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)

    def multiply(v: Tensor) -> Tensor:
        pieces = _shaped_like(parameters, v)
        return _flat(torch.autograd.grad(gradient, parameters, pieces, retain_graph=True))

    return multiply


def gauss_newton(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Map:
    """That of a batch: a tangent by double pull-back, the loss's Hessian, and a pull-back."""
    parameters = list(model.parameters())
    outputs = model(x)
    places, u = outputs.detach().requires_grad_(), torch.ones_like(outputs).requires_grad_()
    pulled = torch.autograd.grad(outputs, parameters, u, create_graph=True)
    (slope,) = torch.autograd.grad(loss(places, y), places, create_graph=True)

    def multiply(v: Tensor) -> Tensor:
        pieces = _shaped_like(parameters, v)
        tangent = torch.autograd.grad(pulled, u, pieces, retain_graph=True)
        curved = torch.autograd.grad(slope, places, tangent, retain_graph=True)
        return _flat(torch.autograd.grad(outputs, parameters, curved, retain_graph=True))

    return multiply


Matrix = Callable[[nn.Module, Loss, Tensor, Tensor], Map]


def true_product(workload: Workload, V: Tensor, matrix: Matrix = hessian) -> Tensor:
    """``H V`` in float64 by plain double backward, batches weighted by their samples."""
    model, data = in_float64(workload)
    columns = V.double().reshape(workload.parameters, -1).T
    total = torch.zeros_like(columns)
    samples = 0
    for x, y in data:
        multiply = matrix(model, workload.loss, x, y)
        total += len(x) * torch.stack([multiply(v) for v in columns])
        samples += len(x)
    return (total / samples).T.reshape(V.shape)


@dataclass(frozen=True)
class Limit:
    """The arithmetic of a product, in units of that of the gradient (matrix products, convolutions)."""

    kept: float  # if what does not depend on v is kept
    live: float  # if nothing is


def limit(workload: Workload, matrix: Matrix = hessian) -> Limit:
    """Counted on one batch."""
    model = workload.fresh()
    parameters = list(model.parameters())
    x, y = next(iter(workload.data))
    with FlopCounterMode(display=False) as forward_flops:
        model(x)
    with FlopCounterMode(display=False) as gradient_flops:
        torch.autograd.grad(workload.loss(model(x), y), parameters)
    multiply = matrix(model, workload.loss, x, y)
    with FlopCounterMode(display=False) as product_flops:
        multiply(torch.ones(workload.parameters))
    gradient, product = gradient_flops.get_total_flops(), product_flops.get_total_flops()
    first = gradient if matrix is hessian else forward_flops.get_total_flops()
    return Limit(kept=product / gradient, live=(first + product) / gradient)


def graph_bytes(workload: Workload) -> int:
    """What the graphs of all batches' gradients keep, each tensor counted once."""
    model = workload.fresh()
    parameters = list(model.parameters())
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for x, y in workload.data:
            alive.append(
                torch.autograd.grad(workload.loss(model(x), y), parameters, create_graph=True)
            )
    known = [*parameters, *(t for batch in workload.data for t in batch)]
    for tensor in known:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


# -- models ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with GroupNorm, and a shortcut around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(4, out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.GroupNorm(4, out),
        )
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + self.shortcut(x))


class Decoder(nn.Module):
    """A causal transformer; logits come as ``(batch, vocabulary, tokens)``, as the loss takes them."""

    def __init__(self, vocabulary: int, tokens: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.Sequential(*(Layer(width, heads, tokens) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.token(x) + self.place)
        return self.head(self.norm(h)).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.register_buffer("future", torch.ones(tokens, tokens, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self._attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        # Written out: the fused kernels have no second derivative, so that most peers would fail.
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        weights = scores.masked_fill(self.future, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(batch, tokens, width)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    with _seeded():
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _classified(batches: int, size: int, shape: tuple[int, ...], classes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _shaped_like(parameters: list[nn.Parameter], v: Tensor) -> list[Tensor]:
    pieces = v.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
