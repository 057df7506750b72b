"""layerwise against the eigenvalues of each diagonal block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvpop import Damped, Diagonal, HessianOperator, LinearOperator, layerwise


def network(width: int) -> HessianOperator:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (40,), generator=generator)
    return HessianOperator(model, nn.CrossEntropyLoss(), [(x[:25], y[:25]), (x[25:], y[25:])])


def test_layers_that_are_multiplied_out_are_exact() -> None:
    H = network(6)
    found, dense = layerwise(H), H.to_dense()
    assert found.names == ("0", "2")
    assert found.entries == (24, 14)
    assert found.status == "converged"
    for i, (start, stop) in enumerate([(0, 24), (24, 38)]):
        eigenvalues = torch.linalg.eigvalsh(dense[start:stop, start:stop])
        size = eigenvalues.abs().sum()
        eps = 1e2 * torch.finfo(torch.float64).eps  # a hundred roundings of what is added up
        assert abs(found.trace[i] - eigenvalues.sum()) <= eps * size
        assert abs(found.largest[i] - eigenvalues[-1]) <= eps * size
        assert abs(found.negative[i] - -eigenvalues.clamp(max=0).sum() / size) <= 1e2 * eps
        assert found.negative_error[i] == 0
    assert found.share.sum().item() == pytest.approx(1.0, rel=1e-12)


def test_larger_layers_are_told_within_their_errors() -> None:
    H = network(60)
    found, dense = layerwise(H, max_products=96), H.to_dense()
    for i, (start, stop) in enumerate([(0, 240), (240, 362)]):
        eigenvalues = torch.linalg.eigvalsh(dense[start:stop, start:stop])
        negative = -eigenvalues.clamp(max=0).sum() / eigenvalues.abs().sum()
        assert abs(found.trace[i] - eigenvalues.sum()) <= 5 * found.trace_error[i] + 1e-12
        assert abs(found.largest[i] - eigenvalues[-1]) <= found.residual[i] + 1e-12
        rounding = (stop - start) * 2.0**-52  # null eigenvalues come out on either side of zero
        assert abs(found.negative[i] - negative) <= 5 * found.negative_error[i] + rounding
        assert found.negative_error[i] < 0.1  # and they are of use


@pytest.mark.parametrize("make", [lambda H: H.linearize(), lambda H: Damped(H, 0.5)])
def test_linearized_and_damped_operators_have_layers_too(make: object) -> None:
    H = network(6)
    A: LinearOperator = make(H)  # type: ignore[operator]
    found, dense = layerwise(A), A.to_dense()
    assert found.names == ("0", "2")
    assert found.trace[1].item() == pytest.approx(dense[24:, 24:].trace().item(), rel=1e-12)


def test_an_operator_without_names_is_refused() -> None:
    with pytest.raises(ValueError, match="layerwise expects an operator over named parameters"):
        layerwise(Diagonal(torch.ones(3)))
