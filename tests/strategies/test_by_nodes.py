"""J read off the graph of outputs: that of the engine for every op that is known, and not used for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import GaussNewtonOperator, GradientOperator, JacobianOperator
from hvpop.strategies import Params, nodes, through_outputs
from hvpop.strategies.by_nodes import ByNodes
from hvpop.strategies.nodes import KINDS, UnreadableError

F64 = torch.float64
EPS = torch.finfo(F64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Residual(nn.Module):
    """Adds what it is given to what its layers make of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.layers(x)
        return made


class Twice(nn.Module):
    """One layer used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(torch.tanh(self.layer(x)))
        return made


def activations() -> dict[str, nn.Module]:
    kinds = (
        *(nn.Tanh, nn.Sigmoid, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    )
    return {kind.__name__: kind() for kind in kinds}


def images() -> dict[str, nn.Module]:
    """Of what takes images; columns go one by one through convolutions and norms."""
    head = nn.Flatten(), nn.Linear(4, 3)
    return {
        "convolution": nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), *head),
        "convolution with groups": nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, padding=1, groups=2, bias=False), nn.ReLU(), nn.Conv2d(4, 1, 2)
        ),
        "convolution transposed": nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1),
        "convolution dilated": nn.Conv2d(2, 1, 2, dilation=2),
        "norm": nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(4, 1, 1)
        ),
        "norm without weights": nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.SiLU(), nn.Conv2d(4, 1, 3)
        ),
        "residual of images": nn.Sequential(
            Residual(nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2)), nn.Tanh()
        ),
        "pools": nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.MaxPool2d(2, 1), nn.AdaptiveAvgPool2d(1), *head
        ),
    }


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        name: nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3))
        for name, activation in activations().items()
    }
    made["ReLU in place"] = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    made["one layer"] = nn.Linear(4, 3)
    made["without biases"] = nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)
    )
    made["residual"] = nn.Sequential(
        nn.Linear(4, 4), Residual(nn.Tanh(), nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)
    )
    made["flattened"] = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    made["used twice"] = Twice()
    made |= images()
    return {name: model.to(F64) for name, model in made.items()}


MODELS = models()


def dense(outputs: Tensor, point: Params) -> Tensor:
    """The Jacobian ``(numel, n)``, a backward pass for each entry."""
    rows = []
    for entry in outputs.flatten():
        found = torch.autograd.grad(
            entry, list(point.values()), retain_graph=True, allow_unused=True
        )
        pairs = zip(found, point.values(), strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return torch.stack(rows)


def flat(tensors: Params, k: int) -> Tensor:
    return torch.cat([t.reshape(k, -1) for t in tensors.values()], 1)


SHAPES = {"rows": (6, 4), "a sequence": (2, 3, 4), "images": (2, 2, 5, 5)}


CASES = [
    (name, shape)
    for name in MODELS
    for shape in SHAPES
    if (name in images()) is (shape == "images")
]
CASES.remove(("flattened", "a sequence"))  # of another shape than the layer is for
CASES.remove(("ReLU in place", "a sequence"))  # writes into a view


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_what_is_read_is_the_jacobian_and_its_transpose(name: str, shape: str) -> None:
    model, x = MODELS[name], normal(*SHAPES[shape])
    names = [n for n, _ in model.named_parameters()]
    for left_out in [None, *names]:
        point = {n: p for n, p in model.named_parameters() if n != left_out}
        if not point:
            continue
        for n, p in model.named_parameters():
            p.requires_grad_(n != left_out)
        z = model(x)
        read, J = ByNodes([z], point), dense(z, point)
        k, n = 3, J.shape[1]
        V = normal(k, n, seed=1)
        S = normal(k, *z.shape, seed=2)
        sizes = [p.numel() for p in point.values()]
        columns = {
            name: part.view(k, *p.shape)
            for (name, p), part in zip(point.items(), V.split(sizes, 1), strict=True)
        }
        rounding = 100 * n * EPS  # of sums of that many, over some layers
        near = {"rtol": 0.0, "atol": rounding * float(J.norm() * max(V.norm(), S.norm()))}
        for i in range(k):
            (there,) = read.push({name: t[i] for name, t in columns.items()})
            torch.testing.assert_close(there.flatten(), J @ V[i], **near)
            back = flat(read.pull([S[i].clone()]), 1)[0]
            torch.testing.assert_close(back, S[i].flatten() @ J, **near)
            once = ByNodes([z], point, once=True)
            (there,) = once.push({name: t[i] for name, t in columns.items()})
            torch.testing.assert_close(there.flatten(), J @ V[i], **near)
            back = flat(once.pull([S[i].clone()]), 1)[0]
            torch.testing.assert_close(back, S[i].flatten() @ J, **near)
        if read.width() > 1:
            (there,) = read.push(columns, k)
            torch.testing.assert_close(there.reshape(k, -1), V @ J.T, **near)
            back = flat(read.pull([S.clone()], k), k)
            torch.testing.assert_close(back, S.view(k, -1) @ J, **near)
    for p in model.parameters():
        p.requires_grad_()


def test_several_outputs_are_read_and_those_without_a_graph_are_zero() -> None:
    layer, x = nn.Linear(4, 3).to(F64), normal(5, 4)
    point = dict(layer.named_parameters())
    z = layer(x)
    ends = [z, torch.tanh(z), torch.zeros(2, dtype=F64)]
    v = {name: normal(*p.shape, seed=3) for name, p in point.items()}
    found = ByNodes(ends, point).push(v)
    moved = x @ v["weight"].T + v["bias"]
    torch.testing.assert_close(found[0], moved)
    torch.testing.assert_close(found[1], moved * (1 - torch.tanh(z.detach()) ** 2))
    assert not found[2].any()
    s = [normal(*t.shape, seed=4) for t in ends]
    expected = torch.autograd.grad(ends[:2], list(point.values()), s[:2], retain_graph=True)
    torch.testing.assert_close(tuple(ByNodes(ends, point).pull(s).values()), expected)


@pytest.mark.parametrize(
    "made",
    [
        lambda x, w: (x @ w).softmax(-1),
        lambda x, w: torch.addmm(normal(6, 3), x, w, alpha=2.0),
        lambda x, w: (x @ w).split(2, 1)[1],
        lambda x, w: (x @ w) + w[0],
        lambda x, w: (x @ w) - 2 * w[:1],
        lambda x, w: (x @ w).view(3, 2, 3).relu_(),
    ],
)
def test_a_graph_that_is_not_known_is_refused(made: Any) -> None:
    w = normal(4, 3).requires_grad_()
    with pytest.raises(UnreadableError):
        ByNodes([made(normal(6, 4), w)], {"w": w})


def test_what_a_version_of_torch_does_not_show_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(node: Any, name: str) -> Any:
        raise AttributeError(name)

    layer = nn.Linear(4, 3)
    monkeypatch.setattr(nodes, "_saved", gone)
    with pytest.raises(UnreadableError):
        ByNodes([layer(torch.zeros(2, 4))], dict(layer.named_parameters()))


def test_what_was_written_to_since_is_refused() -> None:
    layer, x = nn.Linear(4, 3), torch.zeros(2, 4)
    z = layer(x)
    x.add_(1.0)
    with pytest.raises(UnreadableError):
        ByNodes([z], dict(layer.named_parameters()))


# -- in operators ----------------------------------------------------------------------------------

X, Y = normal(12, 4, seed=5), torch.arange(12) % 3
DATA = [(X[:7], Y[:7]), (X[7:], Y[7:])]


def reading(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the graph of each batch was read."""
    read: list[bool] = []
    original = through_outputs.ThroughOutputs.read

    def watched(self: Any, parted: Any, **how: Any) -> Any:
        found = original(self, parted, **how)
        read.append(found is not None)
        return found

    monkeypatch.setattr(through_outputs.ThroughOutputs, "read", watched)
    return read


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)


@pytest.mark.parametrize("kind", [GaussNewtonOperator, GradientOperator])
def test_ordinary_layers_are_read_in_every_product(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reading(monkeypatch)
    A = kind(small(), nn.CrossEntropyLoss(), DATA)
    _ = A.linearize() @ normal(A.shape[1], 20)
    assert read
    assert all(read)


def test_a_model_with_a_hook_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    model[1].register_full_backward_hook(lambda module, given, found: (2 * given[0],))
    read = reading(monkeypatch)
    G = GradientOperator(model, nn.CrossEntropyLoss(), DATA)
    _ = G.T @ torch.ones(12, 2, dtype=F64)
    assert read
    assert not any(read)


class _Wrong(nodes.Entries):
    """Off by a thousandth."""

    def _passed(self, t: Tensor) -> Tensor:
        return 1.001 * super()._passed(t)


class _WrongInOneWeight(nodes.Product):
    """The transpose of what it should be in a bias alone."""

    def pull(self, s: Tensor, k: int | None) -> Any:
        of_bias, *others = super().pull(s, k)
        return [None if of_bias is None else 1.001 * of_bias, *others]


@pytest.mark.parametrize(
    ("node", "wrong"), [("TanhBackward0", _Wrong), ("AddmmBackward0", _WrongInOneWeight)]
)
def test_a_node_that_is_read_wrong_is_noticed_and_the_engine_taken(
    node: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    V = normal(43, 20)
    truth = GaussNewtonOperator(small(), nn.CrossEntropyLoss(), DATA).linearize() @ V
    monkeypatch.setitem(KINDS, node, wrong)
    read = reading(monkeypatch)
    found = GaussNewtonOperator(small(), nn.CrossEntropyLoss(), DATA).linearize() @ V
    assert read
    assert not any(read)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def test_zero_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all units are dead, wrong layers below them are as right as any; later they are not."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(F64)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    monkeypatch.setitem(KINDS, "ReluBackward0", _Wrong)
    J = JacobianOperator(model, [X])
    v = normal(J.shape[1])
    assert bool((J @ v).isfinite().all())
    with torch.no_grad():
        model[0].bias.zero_()
    point = dict(model.named_parameters())
    torch.testing.assert_close(J @ v, dense(model(X), point) @ v, rtol=1e-11, atol=1e-12)


def test_a_hook_on_a_tensor_counts_from_the_moment_that_it_is_there() -> None:
    class Hooked(Twice):
        doubling = False

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x))
            if self.doubling:
                h.register_hook(lambda g: 2 * g)
            made: Tensor = self.layer(h)
            return made

    model = Hooked().to(F64)
    G = GradientOperator(model, nn.CrossEntropyLoss(), DATA)
    for model.doubling in (False, True):
        rows = []
        for x, y in zip(X.split(1), Y.split(1), strict=True):
            model.zero_grad()
            nn.CrossEntropyLoss()(model(x), y).backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        expected = torch.stack(rows).T @ normal(12, 3)
        torch.testing.assert_close(G.T @ normal(12, 3), expected, rtol=1e-11, atol=1e-12)
