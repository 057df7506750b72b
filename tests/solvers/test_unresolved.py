"""Functions that bend or jump at zero: "converged" is not said before what may hide there is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvpop import Dense, Diagonal, HessianOperator, Identity
from hvpop.solvers import matrix_function
from hvpop.solvers.lanczos import Lanczos
from hvpop.solvers.unresolved import unresolved

from .problems import F32, F64, SINGULAR, N, dense, generator, matrix, normal, powers


def relu(t: Tensor) -> Tensor:
    return t.clamp_min(0.0)


def below(t: Tensor) -> Tensor:
    """The projection on the eigenspaces below -1e-3."""
    return (t < -1e-3).to(t.dtype)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "sign": torch.sign,
    "relu": relu,
    "below": below,
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)


def uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=generator(seed), dtype=F64)


def few_small(seed: int) -> tuple[Tensor, Tensor]:
    """Five negative eigenvalues between -1e-4 and -0.1, of little weight, among positive ones."""
    negative = -(10.0 ** (-1 - 3 * uniform(5, seed)))
    weights = normal(100, seed=seed + 1)
    weights[:5] *= 10.0 ** (-4 * uniform(5, seed + 2))
    return torch.cat([negative, 10.0 ** (-3 * uniform(95, seed + 3))]), weights


def beyond_a_gap(seed: int) -> tuple[Tensor, Tensor]:
    """Three negative ones far from the positive ones, which alone look well conditioned."""
    weights = normal(100, seed=seed)
    weights[:3] = 10.0 ** (-5 * uniform(3, seed + 1))
    return torch.cat([-0.5 * uniform(3, seed + 2), 1 + 9 * uniform(97, seed + 3)]), weights


def one_seen(seed: int) -> tuple[Tensor, Tensor]:
    """One negative eigenvalue shows itself at once, two small ones do not."""
    negative = torch.tensor([-1.0, -0.01, -0.003], dtype=F64)
    weights = normal(100, seed=seed)
    weights[1:3] *= 10.0 ** (-1 - 4 * uniform(2, seed + 1))
    return torch.cat([negative, 0.1 + uniform(97, seed + 2)]), weights


def clusters(seed: int) -> tuple[Tensor, Tensor]:
    centres = torch.tensor([1.0, 2.0, 5.0, -0.01, -0.3], dtype=F64)
    shares = torch.tensor([0.4, 0.3, 0.25, 0.02, 0.03], dtype=F64)
    chosen = torch.multinomial(shares, 100, True, generator=generator(seed))
    eigenvalues = centres[chosen] * (1 + 1e-3 * normal(100, seed=seed + 1))
    return eigenvalues, normal(100, seed=seed + 2) * torch.where(eigenvalues < 0, 1e-3, 1.0)


def network(seed: int) -> tuple[Tensor, Tensor]:
    """Few large eigenvalues, many tiny ones of both signs, a vector like a gradient."""
    tiny = 1e-4 * normal(90, seed=seed) * uniform(90, seed + 1)
    eigenvalues = torch.cat([10.0 ** (-2 * uniform(10, seed + 2)), tiny])
    return eigenvalues, normal(100, seed=seed + 3) * (eigenvalues.abs() + 1e-5).sqrt()


def balanced(seed: int) -> tuple[Tensor, Tensor]:
    weights = normal(100, seed=seed)
    weights[:50] *= 10.0 ** (-5 * float(uniform(1, seed + 1)))
    return torch.cat([-powers(-2, 50), powers(-2, 50)]), weights


SPECTRA = [few_small, beyond_a_gap, one_seen, clusters, network, balanced]


@pytest.mark.parametrize("spectrum", SPECTRA)
@EVERY
def test_converged_means_an_error_within_the_tolerance(
    name: str, spectrum: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    """Over seeds and tolerances, by the exact answer; ten times the target would be a false claim."""
    f = FUNCTIONS[name]
    worst, early = 0.0, 0
    for seed in range(0, 60, 10):
        eigenvalues, v = spectrum(seed)
        for rtol in (1e-2, 1e-4, 1e-6):
            of = name if name in ("abs", "sign") else f
            result = matrix_function(Diagonal(eigenvalues), of, rtol=rtol).evaluate(v)  # type: ignore[arg-type]
            assert result.converged  # after 100 steps at the latest, the order of the matrix
            error = float((result.y - f(eigenvalues) * v).norm())
            worst = max(worst, error / max(float(result.targets), 1e-14 * float(v.norm())))
            early += result.steps < 80
    assert worst <= 10
    if name == "abs":
        assert early >= 9  # of 18: it does not wait for the last step


@pytest.mark.parametrize("weight", [1e-1, 1e-3, 1e-5])
def test_one_hidden_eigenvalue_is_waited_for_exactly_if_it_counts(weight: float) -> None:
    """Eigenvalues in [1, 10] and -0.3: of ``v`` a part ``weight`` lies in its direction."""
    eigenvalues = torch.linspace(1, 10, N, dtype=F64)
    eigenvalues[0] = -0.3
    v = normal(N) / N**0.5
    v[0] = weight
    A = Diagonal(eigenvalues)
    tight = matrix_function(A, "sign", rtol=weight / 10).evaluate(v)
    assert tight.converged
    assert abs(float(tight.y[0]) + weight) <= weight / 10 * float(v.norm())
    loose = matrix_function(A, "sign", rtol=5 * weight).evaluate(v)
    assert loose.converged
    assert loose.steps < tight.steps


@EVERY
def test_no_eigenvector_has_more_of_the_error_than_the_bound(name: str) -> None:
    """The theorem, at eigenvalues that are among the points where the bound is computed."""
    octaves = 2.0 ** -torch.arange(0, 24, dtype=F64)
    eigenvalues = torch.cat([octaves, -octaves[6:]])
    for seed in range(5):
        v = normal(len(eigenvalues), seed=seed) * 10.0 ** (-6 * uniform(len(eigenvalues), seed + 1))
        v /= v.norm()
        lanczos = Lanczos(Diagonal(eigenvalues), v.unsqueeze(1))
        for m in range(1, 25):
            lanczos.step()
            ritz, S = torch.linalg.eigh(lanczos.T[:, :m, :m])
            values = FUNCTIONS[name](ritz)
            y = (S @ (values * S[:, 0]).unsqueeze(2)).squeeze(2) @ lanczos.Q[0, :m]
            at = FUNCTIONS[name](eigenvalues)
            largest = values.abs().max()
            inside = (at.abs() <= 10 * largest) | (largest == 0)  # what counts as the domain
            errors = (y[0] - at * v).abs()[inside]
            bound = unresolved(FUNCTIONS[name], ritz, values, S, torch.ones(1, dtype=F64))
            assert float(errors.max()) <= float(bound) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("steps", [0, 40])
def test_the_hessian_of_a_small_network_keeps_its_word(steps: int) -> None:
    """Some of its eigenvalues are zero up to rounding, and of those the sign is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(steps)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    X = normal(100, 8) * 0.8 ** torch.arange(8)
    y = torch.tanh(2 * X @ normal(8, 3, seed=1)).argmax(1)
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    M = HessianOperator(model, loss, [(X, y)]).to_dense()
    M = (M + M.T) / 2
    eigenvalues, U = torch.linalg.eigh(M)
    eigenvalues[eigenvalues.abs() <= 1e-15 * eigenvalues.abs().max()] = 0.0
    V = torch.stack([normal(len(M)), M @ normal(len(M), seed=1), U[:, -3:].sum(1)], 1)
    for name in ("abs", "sign", "relu"):
        f = FUNCTIONS[name]
        exact = U @ (f(eigenvalues).unsqueeze(1) * (U.T @ V))
        of = f if name == "relu" else name
        for rtol in (1e-2, 1e-4):
            result = matrix_function(Dense(M, symmetric=True), of, rtol=rtol).evaluate(V)  # type: ignore[arg-type]
            assert result.converged
            assert bool(((result.y - exact).norm(dim=0) <= 10 * result.targets).all())


def test_a_bend_elsewhere_is_seen_from_a_shifted_operator() -> None:
    for seed in range(0, 60, 10):
        eigenvalues, v = beyond_a_gap(seed)
        A = Diagonal(eigenvalues + 3.0)
        shifted = A - 3.0 * Identity.like(A)
        result = matrix_function(shifted, lambda t: (t + 3.0).clamp_min(3.0)).evaluate(v)
        assert result.converged
        error = float((result.y - (eigenvalues + 3.0).clamp_min(3.0) * v).norm())
        assert error <= 10 * float(result.targets)


def test_a_function_that_is_zero_wherever_anything_was_seen_is_not_taken_for_zero() -> None:
    for seed in range(0, 60, 10):
        eigenvalues, v = beyond_a_gap(seed)
        result = matrix_function(Diagonal(eigenvalues), below, atol=1e-6).evaluate(v)
        assert result.converged
        assert float((result.y - below(eigenvalues) * v).norm()) <= 1e-5
        assert bool(result.y[:3].any())


def test_the_sign_of_zero_is_zero_whatever_rounding_makes_of_it() -> None:
    eigenvalues = SINGULAR["low rank"]
    M, Q = matrix(eigenvalues)
    v = normal(N)
    result = matrix_function(Dense(M, symmetric=True), "sign").evaluate(v)
    assert result.converged
    torch.testing.assert_close(result.y, Q[:, 110:] @ (Q[:, 110:].T @ v), rtol=0, atol=1e-9)


@pytest.mark.parametrize("f", [lambda t: 1 / (t + 0.1), lambda t: torch.exp(-t), torch.tanh])
def test_smooth_functions_of_the_users_cost_no_more_than_those_with_a_name(
    f: Callable[[Tensor], Tensor],
) -> None:
    """What is added for bends at zero adds no step where there is none."""
    A, V = dense(powers(-4)), normal(N, 2)
    result = matrix_function(A, f, rtol=1e-6).evaluate(V)
    named = matrix_function(A, "exp", rtol=1e-6).evaluate(V)
    assert result.converged
    assert named.steps <= 16
    assert result.steps <= 30


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", ["invsqrt", "log"])
def test_no_digits_are_claimed_that_the_products_do_not_have(name: str, dtype: torch.dtype) -> None:
    """An eigenvalue of 1e-10 is known from products to six digits, in float32 one of 1e-4 to three."""
    lowest, rtol = (-10, 1e-9) if dtype is F64 else (-4, 1e-5)
    M = matrix(powers(lowest))[0].to(dtype)
    eigenvalues, U = torch.linalg.eigh(M.double())
    V = normal(N, 4, dtype=dtype)
    result = matrix_function(Dense(M, symmetric=True), name, rtol=rtol).evaluate(V)  # type: ignore[arg-type]
    f = {"invsqrt": torch.rsqrt, "log": torch.log}[name]
    error = (result.y.double() - U @ (f(eigenvalues).unsqueeze(1) * (U.T @ V.double()))).norm(dim=0)
    assert set(result.status) == {"stagnated"}
    assert bool((error <= 3 * result.errors).all())
