"""Time to an answer at equal accuracy: eigenvalues, trace, density, solves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import ours
import peers
import torch
from contests import Plan, Row, as_scipy, attempted, timed
from entrants import Entrant, Product
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor
from workloads import Workload, in_float64

from hvpop import Damped, HessianOperator, solvers, spectrum

Answer = Callable[[Workload], Callable[[], Any]]


@dataclass(frozen=True)
class Truth:
    """What dense linear algebra says in float64."""

    H: Tensor  # (n, n)
    eigenvalues: Tensor  # (n,), ascending


@cache
def dense(workload: Workload) -> Truth:
    """The Hessian by plain double backward over all the data at once."""
    model, data = in_float64(workload)
    parameters = list(model.parameters())
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    gradient = torch.autograd.grad(workload.loss(model(x), y), parameters, create_graph=True)
    rows = []
    for block in torch.eye(workload.parameters, dtype=torch.float64).split(64):
        pieces = block.split([p.numel() for p in parameters], dim=1)
        V = [piece.reshape(-1, *p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        product = torch.autograd.grad(
            gradient, parameters, V, retain_graph=True, is_grads_batched=True
        )
        rows.append(torch.cat([t.flatten(1) for t in product], dim=1))
    H = torch.cat(rows)
    return Truth(H, torch.linalg.eigvalsh(H))


def _ours(name: str) -> Entrant:
    return Entrant(name, True, ours.linearized, ours=True)


def _asked(
    workload: Workload,
    plan: Plan,
    question: str,
    answers: dict[Entrant, Answer],
    error_of: Callable[[Any], float],
    tolerance: float,
) -> list[Row]:
    attempts = [
        attempted(entrant, lambda answer=answer: answer(workload), error_of, tolerance)
        for entrant, answer in answers.items()
    ]
    return timed(workload.name, question, attempts, plan, peers.gradient(workload))


def _operator(workload: Workload) -> HessianOperator:
    return ours.operator(workload)


# -- the ten largest eigenvalues -------------------------------------------------------------------

K, EIGEN_TOLERANCE = 10, 1e-3


def eigenvalues(workload: Workload, plan: Plan) -> list[Row]:
    """Residuals within 1e-3 of the largest eigenvalue, by each library's own algorithm or SciPy's."""
    truth = dense(workload).eigenvalues[-K:]

    def error(found: Any) -> float:
        found = torch.as_tensor(np.array(found), dtype=torch.float64).sort().values
        return float((found - truth).abs().max() / truth.max())

    answers: dict[Entrant, Answer] = {
        _ours("hvpop.spectrum.eigsh"): lambda w: (
            lambda: spectrum.eigsh(_operator(w), K, rtol=EIGEN_TOLERANCE).eigenvalues
        )
    }
    for peer in peers.PEERS:
        if peer.build is peers.eigenthings:
            answers[peer] = lambda w: partial(_eigenthings_lanczos, w)
        elif peer.build is peers.pyhessian:
            answers[peer] = lambda w: partial(_pyhessian_eigenvalues, w)
        else:
            answers[peer] = lambda w, peer=peer: partial(_scipy_eigsh, peer, w)
    question = f"{K} eigenvalues, residuals to {EIGEN_TOLERANCE}"
    return _asked(workload, plan, question, answers, error, EIGEN_TOLERANCE)


def _scipy_eigsh(peer: Entrant, workload: Workload) -> np.ndarray:
    A = as_scipy(peer.build(workload), workload.parameters)
    return eigsh(A, k=K, which="LA", tol=EIGEN_TOLERANCE, return_eigenvectors=False)


def _eigenthings_lanczos(workload: Workload) -> Tensor:
    library = peers.imported("hessian_eigenthings")
    H = peers.eigenthings(workload).own
    return library.lanczos(H, k=K, seed=0, tol=EIGEN_TOLERANCE, which="LA").eigenvalues


def _pyhessian_eigenvalues(workload: Workload) -> list[float]:
    h = peers.pyhessian(workload).own
    return h.eigenvalues(top_n=K, maxIter=100, tol=EIGEN_TOLERANCE)[0]


# -- the trace to two per cent ---------------------------------------------------------------------

TRACE_TOLERANCE, SEEDS = 0.02, 8


def trace(workload: Workload, plan: Plan) -> list[Row]:
    """As many products as hold the error to 2 % in 95 % of runs.

    hvpop finds out by itself; for the others it is found out here and given to them, which is the
    best that their users could do.
    """
    H = dense(workload).H
    true = float(H.trace())

    def error(found: Any) -> float:
        return abs(float(found) / true - 1)

    def typical(estimate: Callable[[int], Any]) -> float:
        return math.sqrt(sum(error(estimate(seed)) ** 2 for seed in range(SEEDS)) / SEEDS)

    answers: dict[Entrant, Callable[[Workload], Callable[[int], Any]]] = {
        _ours("hvpop.spectrum.trace"): lambda w: (
            lambda seed: spectrum.trace(_operator(w), rtol=TRACE_TOLERANCE, seed=seed).value
        ),
    }
    for peer in peers.PEERS:
        if peer.build is peers.curvlinops:
            answers[peer] = lambda w: _curvlinops_trace(w, H, typical)
        elif peer.build is peers.eigenthings:
            answers[peer] = lambda w: _eigenthings_trace(w, H, typical)
        elif peer.build is peers.pyhessian:
            answers[peer] = lambda w: partial(_pyhessian_trace, w)
        elif peer.keeps:
            answers[peer] = lambda w, peer=peer: _hutchinson_trace(peer, w, H)
    question = f"trace to {TRACE_TOLERANCE:.0%}"
    return _asked(
        workload,
        plan,
        question,
        {entrant: _reseeded(answer) for entrant, answer in answers.items()},
        error,
        1.5 * TRACE_TOLERANCE,  # one run in twenty may miss it, and none by far
    )


def _reseeded(answer: Callable[[Workload], Callable[[int], Any]]) -> Answer:
    """Another seed for every estimate."""

    def prepare(workload: Workload) -> Callable[[], Any]:
        estimate, seeds = answer(workload), itertools.count()
        return lambda: estimate(next(seeds))

    return prepare


def _enough(
    estimate: Callable[[int, int], Any], typical: Callable[[Callable[[int], Any]], float]
) -> int:
    """The fewest products, in steps of a third, that reach the accuracy on the dense matrix."""
    products = 12
    while products < 3000 and typical(partial(estimate, products)) > TRACE_TOLERANCE / 1.96:
        products = 3 * round(products * 4 / 9)
    return products


def _curvlinops_trace(workload: Workload, H: Tensor, typical: Any) -> Callable[[int], Any]:
    xtrace = peers.imported("curvlinops").xtrace

    def estimate(A: Any, products: int, seed: int) -> Any:
        torch.manual_seed(seed)
        return xtrace(A, products)

    matrix = H.float()
    products = _enough(lambda m, seed: estimate(matrix, 2 * (m // 2), seed), typical)
    return lambda seed: estimate(peers.curvlinops(workload).own, 2 * (products // 2), seed)


def _eigenthings_trace(workload: Workload, H: Tensor, typical: Any) -> Callable[[int], Any]:
    library = peers.imported("hessian_eigenthings")
    matrix = H.float()
    stand_in = library.LambdaOperator(lambda v: matrix @ v, size=len(H), dtype=torch.float32)

    def estimate(A: Any, products: int, seed: int) -> Any:
        return library.trace(A, num_matvecs=products, method="hutch++", seed=seed).estimate

    products = _enough(partial(estimate, stand_in), typical)
    return lambda seed: estimate(peers.eigenthings(workload).own, products, seed)


def _pyhessian_trace(workload: Workload, seed: int) -> float:
    torch.manual_seed(seed)
    return float(np.mean(peers.pyhessian(workload).own.trace(maxIter=200, tol=1e-3)))


def _hutchinson_trace(peer: Entrant, workload: Workload, H: Tensor) -> Callable[[int], Any]:
    """For libraries without an estimator: random signs, which are three lines."""
    variance = 2 * (H.square().sum() - H.diagonal().square().sum())
    products = math.ceil(variance / (TRACE_TOLERANCE / 1.96 * H.trace()) ** 2)

    def estimate(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (len(H), products), generator=generator).float() * 2 - 1
        return float((signs * peer.build(workload).columns(signs)).sum() / products)

    return estimate


# -- the density of the spectrum -------------------------------------------------------------------

STEPS, PROBES = 64, 8
DENSITY_TOLERANCE = 3e-3


def density(workload: Workload, plan: Plan) -> list[Row]:
    """Stochastic Lanczos quadrature, 8 probes of 64 steps, all smoothed alike.

    The error is the area between the cumulative distributions, over the range of the spectrum.
    """
    truth = dense(workload).eigenvalues
    span = float(truth[-1] - truth[0])
    width = span / STEPS

    def error(found: tuple[Tensor, Tensor]) -> float:
        grid, value = (torch.as_tensor(t, dtype=torch.float64) for t in found)
        estimated = torch.cumulative_trapezoid(value, grid)
        estimated = estimated / estimated[-1]
        z = (grid[1:, None] - truth) / width
        true = torch.special.ndtr(z).mean(1)
        return float(((estimated - true).abs() * grid.diff()).sum() / span)

    def ours_density(w: Workload) -> tuple[Tensor, Tensor]:
        found = spectrum.spectral_density(
            _operator(w), steps=STEPS, width=width, max_products=STEPS * PROBES
        )
        return found.grid, found.value

    def by_curvlinops(w: Workload) -> tuple[Tensor, Tensor]:
        library = peers.imported("curvlinops.papyan2020traces.spectrum")
        kappa = math.exp((STEPS / (STEPS - 1)) ** 2 / 8)  # the same width, as it counts widths
        return library.lanczos_approximate_spectrum(
            peers.curvlinops(w).own, STEPS, num_repeats=PROBES, kappa=kappa
        )

    def by_eigenthings(w: Workload) -> tuple[Tensor, Tensor]:
        library = peers.imported("hessian_eigenthings")
        found = library.spectral_density(
            peers.eigenthings(w).own, num_runs=PROBES, lanczos_steps=STEPS, sigma=width, seed=0
        )
        return found.grid, found.density

    def by_pyhessian(w: Workload) -> Any:
        return peers.pyhessian(w).own.density(iter=STEPS, n_v=PROBES)

    own = {
        peers.curvlinops: by_curvlinops,
        peers.eigenthings: by_eigenthings,
        peers.pyhessian: by_pyhessian,
    }
    answers: dict[Entrant, Answer] = {
        _ours("hvpop.spectrum.spectral_density"): lambda w: partial(ours_density, w)
    }
    for peer in peers.PEERS:
        if peer.build in own:
            answers[peer] = lambda w, find=own[peer.build]: partial(find, w)
    question = f"density, {PROBES} probes of {STEPS} steps"
    return _asked(workload, plan, question, answers, error, DENSITY_TOLERANCE)


# -- solves ----------------------------------------------------------------------------------------

SYSTEMS, SOLVE_TOLERANCE, DAMPING = 16, 1e-4, 1e-2


@dataclass(frozen=True)
class Systems:
    """``(H + damping I) x = b`` for the gradients of some samples."""

    damping: float
    B: Tensor  # (n, SYSTEMS)
    A: Tensor  # (n, n), float64

    def error(self, X: Any) -> float:
        """The largest true residual, relative."""
        X = torch.as_tensor(X, dtype=torch.float64)
        return float(((self.B - self.A @ X).norm(dim=0) / self.B.norm(dim=0)).max())


def systems(workload: Workload) -> Systems:
    """The damping is enough for a definite matrix, and little more."""
    truth = dense(workload)
    damping = DAMPING - min(0.0, 2 * float(truth.eigenvalues[0]))
    A = truth.H + damping * torch.eye(len(truth.H), dtype=torch.float64)
    return Systems(damping, _sample_gradients(workload, SYSTEMS), A)


def on_one_operator(workload: Workload, plan: Plan) -> list[Row]:
    """The same linearized operator, ready, in hvpop's solvers and column by column in SciPy's."""
    given = systems(workload)
    A = Damped(_operator(workload).linearize(), given.damping)
    scipys = Entrant("SciPy's cg, 16 times", True, ours.linearized)

    def by_scipy() -> np.ndarray:
        columns = [cg(A, b, rtol=SOLVE_TOLERANCE)[0] for b in given.B.T.numpy()]
        return np.stack(columns, axis=1)

    answers: dict[Entrant, Answer] = {
        _ours("hvpop.solvers.cg"): lambda w: lambda: solvers.cg(A, given.B, rtol=SOLVE_TOLERANCE).x,
        _ours("hvpop.solvers.block_cg"): lambda w: (
            lambda: solvers.block_cg(A, given.B, rtol=SOLVE_TOLERANCE).x
        ),
        scipys: lambda w: by_scipy,
    }
    question = f"{SYSTEMS} systems, one operator"
    return _asked(workload, plan, question, answers, given.error, 2 * SOLVE_TOLERANCE)


def solves(workload: Workload, plan: Plan) -> list[Row]:
    """From the data to the solutions, true residuals to 1e-4."""
    given = systems(workload)
    damping, B = given.damping, given.B

    def shared(w: Workload) -> Tensor:
        return solvers.block_cg(Damped(_operator(w), damping), B, rtol=SOLVE_TOLERANCE).x

    def plain(w: Workload) -> Tensor:
        return solvers.cg(Damped(_operator(w), damping), B, rtol=SOLVE_TOLERANCE).x

    def preconditioned(w: Workload) -> Tensor:
        H = _operator(w).linearize()
        P = solvers.nystrom(H, 64, damping)
        return solvers.cg(Damped(H, damping), B, preconditioner=P, rtol=SOLVE_TOLERANCE).x

    def by_curvlinops(w: Workload) -> Tensor:
        H = peers.curvlinops(w).own
        linear_cg = peers.imported("linear_operator.utils.linear_cg").linear_cg
        return linear_cg(
            lambda X: H @ X + damping * X, B, tolerance=SOLVE_TOLERANCE / 2, max_iter=1000
        )

    def by_scipy(peer: Entrant, w: Workload) -> np.ndarray:
        A = _damped(peer.build(w), w.parameters, damping)
        columns = [cg(A, b, rtol=SOLVE_TOLERANCE)[0] for b in B.T.numpy()]
        return np.stack(columns, axis=1)

    answers: dict[Entrant, Answer] = {
        _ours("hvpop.solvers.cg"): lambda w: partial(plain, w),
        _ours("hvpop.solvers.block_cg"): lambda w: partial(shared, w),
        _ours("hvpop.solvers.cg, nystrom"): lambda w: partial(preconditioned, w),
    }
    for peer in peers.PEERS:
        if peer.build is peers.curvlinops:
            answers[peer] = lambda w: partial(by_curvlinops, w)
        elif peer.build not in (peers.pydvl_forward, peers.pyhessian):
            answers[peer] = lambda w, peer=peer: partial(by_scipy, peer, w)
    question = f"{SYSTEMS} solves, damping {damping:.2g}"
    return _asked(workload, plan, question, answers, given.error, 2 * SOLVE_TOLERANCE)


def _damped(product: Product, n: int, damping: float) -> LinearOperator:
    H = as_scipy(product, n)
    return LinearOperator((n, n), matvec=lambda v: H @ v + damping * v, dtype="f4")


def _sample_gradients(workload: Workload, k: int) -> Tensor:
    model = workload.fresh()
    parameters = list(model.parameters())
    x, y = next(iter(workload.data))
    columns = [
        torch.autograd.grad(workload.loss(model(x[i : i + 1]), y[i : i + 1]), parameters)
        for i in range(k)
    ]
    return torch.stack([peers.flat(g) for g in columns], dim=1)


QUESTIONS = (eigenvalues, trace, density, solves, on_one_operator)
