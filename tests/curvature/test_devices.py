"""The same numbers on every device that there is: the CPU, and a GPU where torch sees one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hvpop import Damped, HessianOperator
from hvpop.risk.batches import to_device
from hvpop.solvers import cg
from hvpop.spectrum import eigsh
from hvpop.strategies import Compiled, FiniteDifference, ForwardOverReverse, HVPStrategy

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Any) -> Tensor:
        out, _ = self.layer(x)
        return self.head(out.data if isinstance(x, PackedSequence) else out[:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(72, 2),
    )


def attending() -> nn.Module:
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(20, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutional, (2, 8, 8)),
    "attention": (attending, (5, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (5, 3)),
    "rnn": (lambda: Recurrent(nn.RNN), (5, 3)),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def problem(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model on the CPU in float64, and three batches, the last one smaller."""
    build, shape = MODELS[name]
    data = [
        (torch.randn(n, *shape, dtype=torch.float64), torch.randint(2, (n,))) for n in (6, 6, 4)
    ]
    return build().double(), data


def hessian(
    model: nn.Module, data: Any, device: str, strategy: HVPStrategy | None = None
) -> HessianOperator:
    moved = copy.deepcopy(model).to(device)
    return HessianOperator(moved, nn.CrossEntropyLoss(), data, strategy=strategy)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_differences_on_the_cpu(
    name: str, training: bool, device: str
) -> None:
    model, data = problem(name)
    model.train(training)
    H = hessian(model, data, device)
    V = torch.randn(H.shape[0], 3, dtype=torch.float64)
    truth = hessian(model, data, "cpu", FiniteDifference()) @ V
    V = V.to(device)
    assert error(H @ V, truth) < 1e-7
    for memory in (None, 20_000, 0):
        A = H.linearize(memory=memory)
        assert error(A @ V, truth) < 1e-7
        assert error(A @ V[:, 0], truth[:, 0]) < 1e-7


@pytest.mark.parametrize("name", ["convolutions", "attention"])
def test_traced_products_are_those_of_the_cpu(name: str, device: str) -> None:
    model, data = problem(name)
    A = hessian(model, data, device, Compiled(compiler=False)).linearize()
    v = torch.randn(A.shape[0], dtype=torch.float64)
    assert error(A @ v.to(device), hessian(model, data, "cpu") @ v) < 1e-12


def test_traces_take_parameters_viewed_as_complex(device: str) -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3).double())
            self.phase = nn.Parameter(torch.randn(3, 2, 2).double())

        def forward(self, x: Tensor) -> Tensor:
            return ((self.scale * x) @ torch.view_as_complex(self.phase)).abs()

    model = Wave()
    data = [(torch.randn(5, 3).to(torch.complex128), torch.randint(2, (5,)))]
    A = hessian(model, data, device, Compiled(compiler=False)).linearize()
    V = torch.randn(A.shape[0], 16, dtype=torch.float64)
    truth = hessian(model, data, "cpu", FiniteDifference()) @ V
    assert error(A @ V.to(device), truth) < 1e-7
    assert error(A @ V[:, 3].to(device), truth[:, 3]) < 1e-7


def test_layers_that_cannot_be_traced_go_to_the_strategy(device: str) -> None:
    model, data = problem("lstm")
    single = [(x.float(), y) for x, y in data]
    A = hessian(model.float(), single, device, Compiled(compiler=False))
    v = torch.ones(A.shape[0]).to(device)
    expected = hessian(model, single, device) @ v
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert error(A @ v, expected) < 1e-5
        assert error(A.linearize() @ v, expected) < 1e-5
    assert sum("falling back" in str(warning.message) for warning in found) <= 1


@pytest.mark.parametrize("name", ["convolutions", "attention", "rnn"])
def test_forward_mode_gives_them_too(name: str, device: str) -> None:
    model, data = problem(name)
    H = hessian(model, data, device, ForwardOverReverse())
    v = torch.randn(H.shape[0], dtype=torch.float64)
    assert error(H @ v.to(device), hessian(model, data, "cpu") @ v) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_is_single_precision(name: str, device: str) -> None:
    model, data = problem(name)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    truth = hessian(model, data, "cpu") @ v
    single = [(x.float(), y) for x, y in data]
    H = hessian(model.float(), single, device)
    v = v.float().to(device)
    eps = torch.finfo(torch.float32).eps  # attention takes ten of them, TF32 and half precision 1e4
    tolerance = 400 * eps if device == "cpu" or name != "convolutions" else 2e-3  # TF32
    assert error(H @ v, truth) < tolerance
    assert error(H.linearize() @ v, truth) < tolerance
    assert error(H @ torch.stack([v, -v], dim=1), torch.stack([truth, -truth], dim=1)) < tolerance


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_doctor_finds_recurrent_layers_healthy(training: bool, device: str) -> None:
    model, data = problem("lstm")
    assert hessian(model.train(training), data, device).check().healthy


def test_a_packed_sequence_is_a_batch(device: str) -> None:
    model = Recurrent(nn.LSTM).double()
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 4, 2)]
    data = [(pack_sequence(sequences), torch.randint(2, (11,)))]
    H = hessian(model, data, device)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    assert error(H @ v.to(device), hessian(model, data, "cpu", FiniteDifference()) @ v) < 1e-7


def test_a_packed_sequence_moves_without_its_lengths() -> None:
    packed = pack_sequence([torch.ones(2), torch.ones(3)], enforce_sorted=False)
    (moved, targets) = to_device((packed, torch.ones(1)), torch.device("meta"))
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == moved.sorted_indices.device.type == targets.device.type
    assert targets.device.type == "meta"
    assert torch.equal(moved.batch_sizes, packed.batch_sizes)


def test_random_numbers_of_the_user_are_left_alone(device: str) -> None:
    model, data = problem("attention")
    model = nn.Sequential(nn.Dropout(0.3), model).train()
    H = hessian(model, data, device)
    v = torch.randn(H.shape[0], dtype=torch.float64).to(device)
    before = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else ())
    first, second, kept = H @ v, H @ v, H.linearize() @ v
    after = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else ())
    assert all(map(torch.equal, before, after))
    assert error(second, first) < 1e-13
    assert error(kept, first) < 1e-13


def test_solvers_and_scipy_take_the_operator_from_where_it_is(device: str) -> None:
    model, data = problem("attention")
    A = Damped(hessian(model, data, device), 30.0)
    b = torch.randn(A.shape[0], dtype=torch.float64)
    solution = cg(A, b.to(device), rtol=1e-10).x
    assert solution.device.type == device
    assert error(A @ solution, b) < 1e-9
    found, info = scipy.sparse.linalg.cg(A, b.numpy(), rtol=1e-10)
    assert info == 0
    assert error(torch.from_numpy(found), solution) < 1e-8
    largest = scipy.sparse.linalg.eigsh(A, k=1, return_eigenvectors=False)
    assert eigsh(A, k=1).eigenvalues.cpu().numpy() == pytest.approx(largest, rel=1e-6)
