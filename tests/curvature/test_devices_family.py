"""Every matrix, solver and estimate on a GPU, where torch sees one, and on the CPU: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpop import (
    Damped,
    Diagonal,
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    GradientOperator,
    HessianOperator,
    JacobianOperator,
    LowRank,
    block_diagonal,
    layerwise,
)
from hvpop.integrations import Tracker
from hvpop.solvers import Inverse, block_cg, cg, lsmr, minres
from hvpop.spectrum import diagonal, eigsh, frobenius_norm, logdet, spectral_density, trace
from hvpop.strategies import Compiled
from hvpop.testing import check_operator

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Attempting to run cuBLAS"  # torch's, where a thread of its engine is the first to
)

Build = Callable[[nn.Module, list[Any]], Any]

MATRICES: dict[str, Build] = {
    "hessian": lambda model, data: HessianOperator(model, LOSS, data),
    "gauss-newton": lambda model, data: GaussNewtonOperator(model, LOSS, data),
    "gauss-newton, traced": lambda model, data: GaussNewtonOperator(
        model, LOSS, data, strategy=Compiled(compiler=False)
    ),
    "fisher": lambda model, data: FisherOperator(model, nn.CrossEntropyLoss(), data),
    "fisher, 3 draws": lambda model, data: FisherOperator(
        model, nn.CrossEntropyLoss(), data, samples=3
    ),
    "empirical fisher": lambda model, data: EmpiricalFisherOperator(model, LOSS, data),
    "gradients": lambda model, data: GradientOperator(model, LOSS, data),
    "jacobian": JacobianOperator,
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def problem(device: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network on ``device`` and batches on the CPU, where loaders leave them."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)
        )
    data = [
        (
            torch.randn(size, 1, 4, 4, generator=draw, dtype=torch.float64),
            torch.randint(3, (size,), generator=draw),
        )
        for size in (5, 5, 2)
    ]
    return model.double().to(device), data


def columns(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def near(found: Any, expected: Any, error: float = 1e-10) -> bool:
    found, expected = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    return float((found - expected).norm()) <= error * float(expected.norm())


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_those_of_the_cpu_live_and_linearized(name: str, device: str) -> None:
    A, truth = MATRICES[name](*problem(device)), MATRICES[name](*problem("cpu")).to_dense()
    V, U = columns(A.shape[1], 3), columns(A.shape[0], 3)
    if name == "fisher, 3 draws":  # a device draws numbers of its own
        truth = A.to_dense().cpu()
        assert torch.linalg.eigvalsh(truth).min() > -1e-12
    for B in (A, A.linearize()):
        assert (B @ V.to(device)).device.type == device
        assert near(B @ V.to(device), truth @ V)
        assert near(B @ V[:, 0].to(device), truth @ V[:, 0])
        assert near(B.T @ U.to(device), truth.T @ U)
        assert near(torch.from_numpy(B @ V.numpy()), truth @ V)


def test_solvers_solve(device: str) -> None:
    model, data = problem(device)
    A = Damped(GaussNewtonOperator(model, LOSS, data).linearize(), 0.1)
    J = JacobianOperator(model, data)
    d = torch.linspace(1, 2, A.shape[0], dtype=torch.float64)
    B, b = columns(A.shape[0], 4), columns(J.shape[0], 1)
    U = torch.linalg.qr(B[:, :2])[0]
    easy = Diagonal(d.to(device)) + LowRank(U.to(device), torch.ones(2).double().to(device))
    tight = {"rtol": 1e-12}
    found = {
        "cg": cg(A, B[:, :1].to(device), **tight).x,
        "block_cg": block_cg(A, B.to(device), **tight).x,
        "minres": minres(A, B[:, :1].to(device), **tight).x,
        "lsmr": lsmr(J, b.to(device), damping=1.0, **tight).x,
        "Inverse": Inverse(A, partial(cg, **tight)) @ B.to(device),
        "Woodbury": Inverse(easy) @ B.to(device),
    }
    dense, K = A.to_dense().cpu(), J.to_dense().cpu()
    exact = torch.linalg.solve(dense, B)
    truth = {
        "lsmr": torch.linalg.solve(K.T @ K + torch.eye(len(d)).double(), K.T @ b),
        "Woodbury": torch.linalg.solve(torch.diag(d) + U @ U.T, B),
    }
    for name, x in found.items():
        assert x.device.type == device, name
        assert near(x, truth.get(name, exact[:, : x.shape[1]]), 1e-8), name


def test_estimates_are_those_of_the_matrix(device: str) -> None:
    model, data = problem(device)
    H = HessianOperator(model, LOSS, data)
    A = Damped(GaussNewtonOperator(model, LOSS, data), 1.0)
    n = A.shape[0]
    dense, values = A.to_dense().cpu(), torch.linalg.eigvalsh(H.to_dense().cpu())
    pairs = eigsh(H, 4, "BE", data_error=True, rtol=1e-10)
    assert pairs.eigenvectors.device.type == device
    assert near(pairs.eigenvalues, torch.cat([values[:2], values[-2:]]), 1e-8)
    assert near(diagonal(A, max_products=n).value, dense.diagonal(), 1e-10)
    tracked = Tracker(H, k=2, rtol=1e-8)()
    found = [tracked[f"curvature/eigenvalue_{i}"] for i in (1, 2)]
    assert near(found, values.flip(0)[:2], 1e-6)
    assert layerwise(H).largest.shape == (3,)
    # five standard errors
    for estimate, exact in (
        (trace(A), dense.trace()),
        (frobenius_norm(A), dense.norm()),
        (logdet(A), torch.logdet(dense)),
    ):
        assert abs(estimate.value - float(exact)) <= 5 * estimate.standard_error + 1e-8
    density = spectral_density(H)
    assert float(torch.trapezoid(density.value, density.grid)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["hessian", "empirical fisher"])
def test_operators_keep_the_laws(name: str, device: str) -> None:
    A = MATRICES[name](*problem(device))
    check_operator(A)
    check_operator(A.linearize())
    assert A.check().healthy


def test_blocks_are_those_of_the_matrix(device: str) -> None:
    H = MATRICES["hessian"](*problem(device))
    blocks, dense = block_diagonal(H).to_dense(), MATRICES["hessian"](*problem("cpu")).to_dense()
    assert near(blocks, torch.where(blocks.cpu() != 0, dense, 0.0))
    assert 0 < int((blocks != 0).sum()) < H.shape[0] ** 2
