"""Least squares for those who know `scipy.optimize.least_squares`: Gauss-Newton with LSMR on the Jacobian.

Fits three peaks to a noisy spectrum. Each step solves ``min |J step + residuals|^2 + damping |step|^2``
(Levenberg 1944) by LSMR (Fong and Saunders 2011), which takes ``J`` as an operator: neither ``J`` nor ``J' J``,
whose condition number is the square, is ever formed. `scipy.optimize.least_squares`, given the same residuals
and a dense Jacobian, has to end at the same sum of squares.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hvpop import JacobianOperator
from hvpop.solvers import lsmr

NOISE = 0.02


class Peaks(nn.Module):
    """A sum of Gaussian peaks with heights, places and widths of their own."""

    def __init__(self, places: list[float]) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.ones(len(places), dtype=torch.float64))
        self.place = nn.Parameter(torch.tensor(places, dtype=torch.float64))
        self.width = nn.Parameter(torch.full((len(places),), 0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.height * torch.exp(-(((x - self.place) / self.width) ** 2))).sum(
            1, keepdim=True
        )


def main(steps: int = 60) -> tuple[list[float], float]:
    """The sums of squares step by step, and SciPy's; exit with a message if they do not meet."""
    torch.manual_seed(0)
    truth = Peaks([1.0, 2.2, 4.0])
    with torch.no_grad():
        truth.height.copy_(torch.tensor([1.0, 0.6, 1.4]))
        truth.width.copy_(torch.tensor([0.4, 0.7, 0.3]))
        x = torch.linspace(0, 5, 400, dtype=torch.float64)[:, None]
        y = truth(x) + NOISE * torch.randn(400, 1, dtype=torch.float64)

    start = [0.7, 2.6, 3.8]
    model = Peaks(start)
    J = JacobianOperator(model, [x])  # (400, 9); follows the parameters
    squares = fit(model, J, x, y, steps)
    scipys = by_scipy(Peaks(start), x, y)
    print(
        f"{J}\n{len(squares) - 1} steps: {squares[0]:.3f} -> {squares[-1]:.8f}, SciPy {scipys:.8f}"
    )
    print(f"{400 * NOISE**2:.3f} is what noise alone leaves of it, on average")
    if abs(squares[-1] - scipys) > 1e-6 * scipys:
        raise SystemExit("Gauss-Newton should have ended at the minimum that SciPy finds")
    return squares, scipys


def fit(model: nn.Module, J: JacobianOperator, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """The sums of squares; a step that lowers them is taken and the damping reduced, else raised."""
    damping, squares = 1.0, []
    for _ in range(steps):
        with torch.no_grad():
            residuals = (model(x) - y).flatten()
        squares.append(float(residuals @ residuals))
        before = parameters_to_vector(model.parameters()).detach()
        A = J.linearize()
        while damping < 1e8:
            step = lsmr(A, -residuals, damping=damping, rtol=1e-10).x
            vector_to_parameters(before + step, model.parameters())
            with torch.no_grad():
                now = float((model(x) - y).square().sum())
            if now <= squares[-1]:
                break
            damping *= 4
        damping /= 3
        print(f"step {len(squares):2d}  sum of squares {now:.8f}  damping {damping:.1e}")
        if squares[-1] - now <= 1e-12 * squares[-1]:
            break
    return [*squares, now]


def by_scipy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The sum of squares where SciPy ends, with the same model and a Jacobian written out."""
    J = JacobianOperator(model, [x])

    def at(p: np.ndarray) -> None:
        vector_to_parameters(torch.from_numpy(p.copy()), model.parameters())

    def residuals(p: np.ndarray) -> np.ndarray:
        at(p)
        with torch.no_grad():
            return (model(x) - y).flatten().numpy()

    def jacobian(p: np.ndarray) -> np.ndarray:
        at(p)
        return J.to_dense().numpy()

    p0 = parameters_to_vector(model.parameters()).detach().numpy()
    found = least_squares(residuals, p0, jac=jacobian, xtol=1e-12, ftol=1e-12)
    return float(2 * found.cost)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    main()
