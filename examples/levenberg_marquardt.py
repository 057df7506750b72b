"""A damping of one's own: Levenberg-Marquardt, which damps by the diagonal of the matrix.

Fits a small network to a curve. Each step solves ``(H + strength D) step = -gradient``. A step that
lowers the loss is taken and the strength reduced, towards Newton's method; otherwise the strength
is raised and the step solved for again, shorter and closer to scaled gradient descent (Marquardt
1963, with the full Hessian in place of the Gauss-Newton matrix).
"""

from __future__ import annotations

import torch
from scipy.sparse.linalg import minres
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hvpop import Damped, HessianOperator, LinearOperator


class Marquardt(Damped):
    """``A + strength |diag(A)|``: each parameter is damped in its own units."""

    def __init__(self, A: LinearOperator, strength: float) -> None:
        super().__init__(A)
        self.strength = strength
        diagonal = A.to_dense().diagonal().abs()  # A is small here; n products
        self.scale = diagonal.clamp(min=1e-3 * diagonal.max())[:, None]

    def damping(self, V: Tensor) -> Tensor:
        return self.strength * self.scale * V


def main(steps: int = 80) -> list[float]:
    """The loss before each step, and at the end."""
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 80, dtype=torch.float64)[:, None]
    y = torch.sin(3 * x) * torch.exp(-x / 2)
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    mse = nn.MSELoss()
    H = HessianOperator(model, mse, [(x, y)])  # follows the parameters as they are trained

    strength = 1.0
    losses = [mse(model(x), y).item()]
    for _ in range(steps):
        A = Marquardt(H.linearize(), strength)  # the Hessian here, fixed while steps are tried
        start = parameters_to_vector(model.parameters()).detach()
        g = parameters_to_vector(torch.autograd.grad(mse(model(x), y), list(model.parameters())))
        while A.strength < 1e8:
            # minres, not cg: far from a minimum H has negative eigenvalues, damped or not.
            step, _ = minres(A, -g.numpy(), rtol=1e-8)
            vector_to_parameters(start + torch.from_numpy(step), model.parameters())
            loss = mse(model(x), y).item()
            if loss < losses[-1]:
                break
            A.strength *= 4
            vector_to_parameters(start, model.parameters())
        else:
            break  # no direction is downhill: a minimum, as far as rounding lets us see
        strength = A.strength / 2
        losses.append(loss)
    for i in range(0, len(losses), 10):
        print(f"step {i:3d}  loss {losses[i]:.3e}")
    print(f"{A}\nloss {losses[0]:.2e} -> {losses[-1]:.2e} in {len(losses) - 1} steps")
    if not losses[-1] < 1e-3 * losses[0]:
        raise SystemExit("Levenberg-Marquardt should have reduced the loss a thousandfold")
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
