"""eigsh: right pairs on every kind of spectrum, true residuals, few products."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpop import Dense, Diagonal, FromFunction, LinearOperator
from hvpop.spectrum import eigsh

from .spectra import EPS, F64, SPECTRA, Watched, dense, digits_hessians, generator, matrix

K = 5


def wanted(eigenvalues: torch.Tensor, which: str) -> torch.Tensor:
    ascending = eigenvalues.sort().values
    if which == "LA":
        return ascending[-K:]
    if which == "SA":
        return ascending[:K]
    if which == "BE":
        return torch.cat([ascending[: K // 2], ascending[-(K - K // 2) :]])
    by_size = eigenvalues[eigenvalues.abs().argsort(descending=which == "LM", stable=True)]
    return by_size[:K].sort().values


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs_are_those_of_the_matrix(name: str, which: str, block: int) -> None:
    spectrum = SPECTRA[name]
    M, _ = matrix(spectrum)
    # The small end of these two is closer together than products can tell; the whole space can.
    hard = which in ("SA", "BE") and name in ("condition 1e8", "multiple")
    basis, block = (150, max(block, 3 if name == "multiple" else 1)) if hard else (None, block)
    rtol = 1e-9
    found = eigsh(Dense(M, symmetric=True), K, which, block=block, basis=basis, rtol=rtol)  # type: ignore[arg-type]
    size = spectrum.abs().max()
    assert found.status == "converged"
    assert (found.eigenvalues - wanted(spectrum, which)).abs().max() <= 1e-8 * size
    V = found.eigenvectors
    assert (V.T @ V - torch.eye(K, dtype=F64)).abs().max() < 1e-12
    residuals = torch.linalg.vector_norm(M @ V - V * found.eigenvalues, dim=0)
    # sums of n products round by sqrt(n) of their size but for once in exp(lambda^2 / 2) (Higham and
    # Mary, 2019; lambda = 2 here), in the product of this test and in that of the solver
    rounding = 2 * 2 * len(M) ** 0.5 * EPS / 2 * (M.norm() + size)
    assert residuals.max() <= rtol * size + rounding
    torch.testing.assert_close(residuals, found.residuals, rtol=0, atol=float(rounding))


def test_eigenvectors_of_simple_eigenvalues_are_as_right_as_their_gaps_allow() -> None:
    spectrum = SPECTRA["indefinite"]
    M, Q = matrix(spectrum)
    rtol = 1e-10
    found = eigsh(Dense(M, symmetric=True), K, "LM", rtol=rtol)
    largest = spectrum.abs().argsort(descending=True)[:K]
    largest = largest[spectrum[largest].argsort()]  # in the order of what is found
    sines = found.eigenvectors - Q[:, largest] * (Q[:, largest] * found.eigenvectors).sum(0)
    # Davis and Kahan (1970): the sine is at most the residual over the gap. The matrix itself has its
    # eigenvectors from Q up to a rounding of a few sizes.
    distances = (spectrum[largest].unsqueeze(1) - spectrum).abs()
    distances[range(K), largest] = torch.inf
    size = spectrum.abs().max()
    bound = (rtol * size + 4 * EPS * spectrum.norm()) / distances.amin(1)
    assert (torch.linalg.vector_norm(sines, dim=0) <= bound).all()
    assert bound.max() < 1e-8


@pytest.mark.parametrize("seed", range(5))
def test_one_vector_finds_all_copies_of_multiple_eigenvalues(seed: int) -> None:
    found = eigsh(dense(SPECTRA["multiple"], seed), 7, seed=seed)
    torch.testing.assert_close(
        found.eigenvalues, SPECTRA["multiple"][:7].flip(0), rtol=1e-9, atol=0.0
    )


BULK = torch.linspace(-0.5, 0.5, 200, dtype=F64)
GEOMETRIC = 0.9 ** torch.arange(200, dtype=F64)


def with_bulk(*values: float, bulk: torch.Tensor = BULK) -> torch.Tensor:
    return torch.cat([torch.tensor(values, dtype=F64), bulk])


COPIES: dict[str, tuple[torch.Tensor, int, str]] = {
    "twice at the top": (with_bulk(1, 1, 0.8, 0.7), 2, "LA"),
    "twice at the bottom": (with_bulk(-1, -1, -0.8), 3, "SA"),
    "twice at both ends": (with_bulk(1, 1, -1, -1, 0.9, -0.9), 4, "LM"),
    "twice at either end": (with_bulk(1, 1, -1, -1, 0.9, -0.9), 4, "BE"),
    "twice inside": (with_bulk(1, 0.8, 0.8, 0.7, 0.6), 5, "LA"),
    "three times beside the bulk": (with_bulk(0.52, 0.52, 0.52), 3, "LA"),
    "six times beside four": (with_bulk(*[10.0] * 6, *[9.999] * 4), 8, "LA"),
    "nearly the same": (with_bulk(1, 1 - 1e-12, 0.8), 2, "LA"),
    "twice, then three times": (torch.cat([with_bulk(5, 5, 3, 3, 3, bulk=GEOMETRIC)]), 5, "LM"),
    "low rank and noise": (with_bulk(1, 1, 1, bulk=1e-3 * BULK), 3, "LA"),
    "null modes": (with_bulk(0, 0, 0, 0.1, bulk=1 + BULK), 4, "SA"),
    "null modes of a rank": (with_bulk(*[1.0] * 6, 0.5, bulk=torch.zeros(90, dtype=F64)), 7, "LA"),
    "cut by k": (with_bulk(2, 1, 1, 1), 2, "LA"),
    "nothing but copies": (torch.ones(50, dtype=F64).repeat_interleave(2), 5, "LM"),
}


def chosen(d: torch.Tensor, k: int, which: str) -> torch.Tensor:
    ascending = d.sort().values
    if which == "BE":
        return torch.cat([ascending[: k // 2], ascending[d.shape[0] - (k - k // 2) :]])
    if which == "LM":
        return d[d.abs().argsort(descending=True, stable=True)[:k]].sort().values
    return ascending[-k:] if which == "LA" else ascending[:k]


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", COPIES)
def test_no_copy_is_missing_from_what_has_converged(name: str, block: int) -> None:
    d, k, which = COPIES[name]
    for seed in range(3):
        found = eigsh(Diagonal(d), k, which, block=block, seed=seed, max_products=5000)  # type: ignore[arg-type]
        assert found.status == "converged"
        # one missing would be off by 2e-2 of the norm, or 1e-4 where they are that close
        error = (found.eigenvalues - chosen(d, k, which)).abs().max()
        assert error <= 2 * EPS**0.5 * d.abs().max()


def test_copies_are_found_in_single_precision() -> None:
    for seed in range(3):
        d, k, _ = COPIES["six times beside four"]
        found = eigsh(Diagonal(d.float()), k, seed=seed)
        assert found.status == "converged"
        assert (found.eigenvalues > 9.99).all()


def test_a_budget_that_ends_before_copies_are_ruled_out_says_so() -> None:
    A = Diagonal(torch.linspace(0, 1, 500, dtype=F64) ** 3)
    whole = eigsh(A, 3)
    cut = eigsh(A, 3, max_products=whole.products - 3)
    assert (whole.status, cut.status) == ("converged", "unresolved copies")
    torch.testing.assert_close(cut.eigenvalues, whole.eigenvalues)


@pytest.mark.parametrize("k", [1, 3])
def test_no_start_hides_what_is_wanted(k: int) -> None:
    d = torch.cat([BULK, torch.tensor([0.9, 0.9, 1.0], dtype=F64)])
    eye = torch.eye(203, dtype=F64)
    starts = {
        "an eigenvector": eye[:, 200],
        "several": eye[:, 197:201],
        "orthogonal to one": torch.cat([torch.ones(202), torch.zeros(1)]).to(F64),
    }
    for v0 in starts.values():
        for seed in range(3):
            for rtol in (1e-2, None):
                found = eigsh(Diagonal(d), k, v0=v0, rtol=rtol, seed=seed)
                assert found.status == "converged"
                assert (found.eigenvalues - chosen(d, k, "LA")).abs().max() <= (rtol or 1e-7)


def test_copies_outside_of_what_is_deflated_are_found() -> None:
    d, eye = with_bulk(1, 1, 1, 0.8), torch.eye(204, dtype=F64)
    for seed in range(3):
        found = eigsh(Diagonal(d), 2, deflate=eye[:, :1], seed=seed)
        assert found.status == "converged"
        assert (found.eigenvalues > 1 - 1e-7).all()


@pytest.mark.parametrize("n", [2, 3, 6])
def test_a_small_matrix_of_copies_is_known_whole(n: int) -> None:
    d = torch.ones(n, dtype=F64)
    d[-1] = 2.0
    for k in range(1, n + 1):
        found = eigsh(Diagonal(d), k)
        assert found.status == "converged"
        assert found.products <= 2 * n
        torch.testing.assert_close(found.eigenvalues, d[-k:])


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_a_multiple_of_the_operator_has_that_multiple_of_the_eigenpairs(scale: float) -> None:
    d = torch.tensor([*[0.1 * i for i in range(20)], 3.0, 3.0, 4.0])
    s = 2.0 ** math.frexp(scale)[1]  # multiplied without rounding
    one, other = (eigsh(Diagonal(c * d), 3) for c in (1.0, s))
    assert (one.status, one.products) == (other.status, other.products)
    assert torch.equal(s * one.eigenvalues, other.eigenvalues)
    step = 2.0**-149  # of float32 below its normal numbers
    torch.testing.assert_close(s * one.residuals, other.residuals, rtol=0, atol=step)
    assert torch.equal(one.eigenvectors, other.eigenvectors)
    assert eigsh(Diagonal(scale * d), 3).status == "converged"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_operator_that_is_not_finite_is_told(bad: float) -> None:
    with pytest.raises(FloatingPointError, match=r"eigsh.*not finite"):
        eigsh(Diagonal(torch.tensor([1.0, bad, 2.0])), 1)


def test_generators_of_equal_seeds_give_equal_results() -> None:
    A = dense(SPECTRA["spread"])
    first, again = (eigsh(A, 2, seed=generator(3)) for _ in range(2))
    assert torch.equal(first.eigenvectors, again.eigenvectors)
    with pytest.raises(TypeError, match=r"eigsh expects seed as an integer or a torch.Generator"):
        eigsh(A, 2, seed=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1, 2])
def test_the_smallest_magnitudes_inside_an_indefinite_spectrum(block: int) -> None:
    inner = torch.tensor([-0.02, 0.05], dtype=F64)
    outer = torch.linspace(1, 2, 40, dtype=F64)
    found = eigsh(dense(torch.cat([-outer, inner, outer])), 2, "SM", block=block)
    assert found.status == "converged"
    torch.testing.assert_close(found.eigenvalues, inner, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_multiple_of_the_identity_and_zero(value: float) -> None:
    found = eigsh(Diagonal(torch.full((30,), value, dtype=F64)), 4)
    assert found.status == "converged"
    torch.testing.assert_close(found.eigenvalues, torch.full((4,), value, dtype=F64))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_all_eigenvalues_of_a_small_matrix(n: int) -> None:
    d = torch.arange(1.0, n + 1, dtype=F64)
    found = eigsh(Diagonal(d), n)
    torch.testing.assert_close(found.eigenvalues, d)
    assert found.products == n


def test_it_has_not_converged_beside_deflated_vectors_that_are_no_eigenvectors() -> None:
    M, Q = matrix(SPECTRA["spread"])
    rough = Q[:, -4:] + 1e-3 * torch.randn(Q.shape[0], 4, dtype=F64, generator=generator(1))
    found = eigsh(Dense(M, symmetric=True), 3, deflate=rough)
    assert found.status == "stagnated"
    assert found.residuals.max() > 1e-6


def test_deflated_vectors_are_not_found_again() -> None:
    spectrum = SPECTRA["spread"]
    M, Q = matrix(spectrum)
    found = eigsh(Dense(M, symmetric=True), 3, deflate=Q[:, -4:])
    torch.testing.assert_close(found.eigenvalues, spectrum[-7:-4])
    assert (Q[:, -4:].T @ found.eigenvectors).abs().max() < 1e-12


def test_products_and_passes_are_counted() -> None:
    for block in (1, 4):
        watched = Watched(dense(SPECTRA["spread"]))
        found = eigsh(watched.operator, 3, block=block)
        assert found.products == watched.products
        assert watched.passes * block == watched.products


@pytest.fixture(scope="module")
def hessians() -> list[LinearOperator]:
    return digits_hessians(60, 63)


@pytest.mark.parametrize("tol", [0.0, 1e-8])
def test_the_digits_hessian_needs_at_most_scipys_products_and_a_seventh(
    hessians: list[LinearOperator], tol: float
) -> None:
    H = hessians[0]
    ours = theirs = 0
    for seed in range(3):
        watched = Watched(H)
        v0 = torch.randn(H.shape[0], dtype=F64, generator=generator(seed)).numpy()
        values, vectors = scipy.sparse.linalg.eigsh(
            watched.operator, k=10, which="LA", tol=tol, v0=v0
        )
        theirs += watched.products
        V = torch.from_numpy(np.ascontiguousarray(vectors))
        R = H @ V - V * torch.from_numpy(values)
        accuracy = torch.linalg.vector_norm(R, dim=0).max().item() / values.max()
        found = eigsh(H, 10, rtol=max(accuracy, 1e-14), seed=seed)
        assert found.status == "converged"
        np.testing.assert_allclose(found.eigenvalues.numpy(), np.sort(values), rtol=1e-10)
        ours += found.products
    print(f"\nk = 10, tol = {tol}: {ours} products, SciPy {theirs}, ratio {ours / theirs:.2f}")
    assert ours <= (1 + 1 / 7) * theirs  # SciPy does not look for missing copies


@pytest.mark.parametrize(("k", "rtol"), [(1, 1e-3), (10, 1e-3), (10, 1e-8)])
def test_a_warm_start_needs_fewer_products(
    hessians: list[LinearOperator], k: int, rtol: float
) -> None:
    before = eigsh(hessians[0], k, rtol=rtol).eigenvectors
    cold = eigsh(hessians[1], k, rtol=rtol)
    warm = eigsh(hessians[1], k, rtol=rtol, v0=before)
    print(f"\nk = {k}, rtol = {rtol}: cold {cold.products} products, warm {warm.products}")
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=1e-2 * rtol**0.5, atol=0.0)
    assert warm.products < cold.products


def test_a_block_needs_fewer_passes(hessians: list[LinearOperator]) -> None:
    passes = {}
    for block in (1, 4):
        watched = Watched(hessians[0])
        eigsh(watched.operator, 10, block=block)
        passes[block] = watched.passes
    print(f"\npasses by block size: {passes}")
    assert passes[4] <= 0.6 * passes[1]


def test_a_warm_start_that_is_an_invariant_subspace_does_not_hide_the_rest() -> None:
    spectrum = SPECTRA["spread"]
    M, Q = matrix(spectrum)
    found = eigsh(Dense(M, symmetric=True), 2, v0=Q[:, :2])
    torch.testing.assert_close(found.eigenvalues, spectrum[-2:])


def test_single_precision_and_half_models_converge() -> None:
    M, _ = matrix(SPECTRA["indefinite"])
    single = eigsh(Dense(M.float(), symmetric=True), 3)
    assert single.status == "converged"
    assert single.eigenvectors.dtype is torch.float32
    torch.testing.assert_close(
        single.eigenvalues.double(), torch.tensor([1.28, 1.6, 2.0]).double(), rtol=1e-5, atol=0
    )
    half = FromFunction(lambda V: M.float() @ V, (150, 150), dtype=torch.bfloat16, symmetric=True)
    assert eigsh(half, 3).eigenvectors.dtype is torch.float32


def test_a_million_entries_in_single_precision_converge_to_the_default_tolerance() -> None:
    """``8 q q' + 10 p p' + P D P``: ``P`` projects on what is orthogonal to both signs, ``D`` is in [0, 1]."""
    n = 1_000_000
    q = 2.0 * torch.randint(0, 2, (n,), generator=generator(0)) - 1.0
    p = q * torch.tensor([1.0, -1.0]).repeat(n // 2)
    d = torch.rand(n, generator=generator(1))

    def parts(v: Tensor) -> tuple[Tensor, Tensor]:
        return (q * v).sum(dtype=F64) / n, (p * v).sum(dtype=F64) / n

    def times(V: Tensor) -> Tensor:
        v = V[:, 0]
        a, b = parts(v)
        y = d * (v - a * q - b * p)
        c, e = parts(y)
        return (y + (8 * a - c) * q + (10 * b - e) * p)[:, None]

    A = FromFunction(times, (n, n), dtype=torch.float32, symmetric=True)
    found = eigsh(A, 2)
    assert found.status == "converged"
    eps = torch.finfo(torch.float32).eps
    # the square of a residual of sqrt(eps) |A| over the gap of two, and the rounding of some products
    torch.testing.assert_close(
        found.eigenvalues.double(),
        torch.tensor([8.0, 10.0], dtype=F64),
        rtol=0,
        atol=eps * 10**2 / 2 + 10 * eps * 10,
    )


def test_a_tolerance_below_rounding_is_called_stagnated() -> None:
    M, _ = matrix(SPECTRA["spread"])
    found = eigsh(Dense(M.float(), symmetric=True), 2, rtol=1e-9)
    assert found.status == "stagnated"
    assert found.residuals.max() < 1e-4


def test_a_spent_budget_returns_the_best_so_far() -> None:
    found = eigsh(dense(SPECTRA["spread"]), 3, max_products=12)
    assert (found.status, found.products) == ("max products", 12)
    M, _ = matrix(SPECTRA["spread"])
    V = found.eigenvectors
    residuals = torch.linalg.vector_norm(M @ V - V * found.eigenvalues, dim=0)
    torch.testing.assert_close(found.residuals, residuals)


def test_ctrl_c_returns_what_there_is() -> None:
    watched = Watched(dense(SPECTRA["spread"]), fail_at=20, error=KeyboardInterrupt)
    found = eigsh(watched.operator, 3)
    assert (found.status, found.products) == ("interrupted", 19)
    assert found.eigenvectors.shape == (150, 3)


def test_ctrl_c_with_nothing_done_is_passed_on() -> None:
    watched = Watched(dense(SPECTRA["spread"]), fail_at=1, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        eigsh(watched.operator, 3)


def test_equal_seeds_give_equal_bits_and_other_seeds_equal_answers() -> None:
    A = dense(SPECTRA["spread"])
    first, again, other = eigsh(A, 3), eigsh(A, 3), eigsh(A, 3, seed=1)
    assert torch.equal(first.eigenvectors, again.eigenvectors)
    assert not torch.equal(first.eigenvectors, other.eigenvectors)
    torch.testing.assert_close(first.eigenvalues, other.eigenvalues)


def test_progress_shows_the_residual(capsys: pytest.CaptureFixture[str]) -> None:
    eigsh(dense(SPECTRA["spread"]), 3, progress=True)
    assert "3 of 3 found" in capsys.readouterr().err


def test_the_text_of_a_result_says_what_matters() -> None:
    text = repr(eigsh(Diagonal(torch.arange(9, dtype=F64)), 2))
    assert text.startswith("<2 eigenpairs, 7 to 8, residuals up to")
    assert text.endswith("converged>")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k >= 1, got k=0"),
        ({"k": 2.5}, TypeError, "k as an integer, got k=2.5"),
        ({"rtol": "x"}, TypeError, "rtol as a number, got rtol='x'"),
        ({"k": 11}, ValueError, "1 <= k <= 10"),
        ({"which": "LR"}, ValueError, "which in"),
        ({"block": 0}, ValueError, "block >= 1"),
        ({"rtol": -1.0}, ValueError, "rtol > 0"),
        ({"max_products": 0}, ValueError, "max_products >= 1"),
        ({"basis": 2, "k": 2}, ValueError, "basis >= k"),
        ({"v0": torch.ones(9)}, ValueError, r"v0 to be a tensor \(10,\)"),
        ({"v0": torch.zeros(10, dtype=F64)}, ValueError, "not zero"),
        ({"deflate": torch.ones(3, 2)}, ValueError, "deflate to be a tensor"),
        (
            {"deflate": torch.zeros(10, 2)},
            ValueError,
            "deflate with finite columns that are not zero",
        ),
    ],
)
def test_misuse_is_refused(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        eigsh(Diagonal(torch.arange(10, dtype=F64)), **{"k": 2, **arguments})  # type: ignore[arg-type]


def test_only_symmetric_hvpop_operators_are_taken() -> None:
    with pytest.raises(ValueError, match="symmetric=False"):
        eigsh(Dense(torch.ones(3, 3)), 1)
    with pytest.raises(TypeError, match=r"hvpop.LinearOperator, got ndarray"):
        eigsh(np.ones((3, 3)), 1)  # type: ignore[arg-type]


def test_a_start_is_real_and_a_count_is_an_integer() -> None:
    A = Diagonal(torch.arange(1.0, 21.0, dtype=F64))
    with pytest.raises(TypeError, match=r"v0 with real numbers, got torch\.complex128"):
        eigsh(A, 2, v0=torch.ones(20, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"got ndarray; use torch\.as_tensor"):
        eigsh(A, 2, v0=torch.ones(20).numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="eigsh expects k as an integer, got k=None"):
        eigsh(A, None)  # type: ignore[arg-type]
