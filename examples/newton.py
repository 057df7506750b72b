"""Newton's method on a small network, composed of an operator, a damping and a solver.

Adam brings a classifier of handwritten digits near a minimum; Newton-CG and torch's L-BFGS then go
on from the same point to the bottom of it, as is needed before Hessians are used to say anything
about the minimum (influence functions, Laplace approximations). The objective is cross entropy plus
weight decay, so its Hessian is the operator of the first, damped by the decay: ``Damped``. Each step
is that of `steihaug`, conjugate gradients within a trust region, which take a direction of negative
curvature for what it is: a way down.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from hvpop import Damped, HessianOperator
from hvpop.solvers import steihaug

CROSS_ENTROPY = nn.CrossEntropyLoss()
DECAY = 0.01
FLAT = 1e-7  # the largest entry of the gradient at which either method stops


def main(images: int = 1000, hidden: int = 10) -> tuple[Run, Run]:
    """Print and return how Newton-CG and L-BFGS went; exit with a message if they disagree."""
    torch.manual_seed(1)
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x[:images] / 16), torch.from_numpy(y[:images])
    near = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    warm_up(Objective(near, x, y), steps=300)

    newton = newton_cg(Objective(copy.deepcopy(near), x, y))
    lbfgs = l_bfgs(Objective(copy.deepcopy(near), x, y))
    print_table(newton, lbfgs)
    gap = abs(newton.loss - lbfgs.loss)
    failed = [f"{run.name} stopped at a slope of {run.slope:.1e}" for run in (newton, lbfgs)
              if not run.slope <= FLAT]  # fmt: skip
    if not gap <= 1e-7:
        failed.append(f"the two minima differ by {gap:.1e}")
    if not newton.products + newton.gradients < lbfgs.gradients:
        failed.append("Newton-CG needed more passes over the data than L-BFGS")
    if failed:
        raise SystemExit("not as it must be: " + "; ".join(failed))
    return newton, lbfgs


def newton_cg(objective: Objective, most: int = 100) -> Run:
    """A trust-region Newton method (Steihaug 1983; Nocedal and Wright 2006, algorithm 4.1)."""
    live = HessianOperator(objective.model, CROSS_ENTROPY, [(objective.x, objective.y)])
    hessian = Damped(live, {"*weight": DECAY})  # of the objective, wherever its parameters are
    radius, products, steps = 1.0, 0, 0
    loss, g = objective.value_and_gradient()
    start = time.perf_counter()
    with tqdm(desc="Newton-CG", unit=" steps") as bar:
        while g.abs().max() > FLAT and steps < most:
            # Far away a rough step is as good as an exact one; near the minimum, and only there,
            # accuracy pays: a tolerance that falls with the gradient gives superlinear convergence.
            trial = steihaug(hessian, g, radius, rtol=min(0.5, float(g.norm()) ** 0.5))
            products += trial.products
            steps += 1
            point = objective.point
            objective.point = point + trial.step
            new_loss, new_g = objective.value_and_gradient()
            rounding = 10 * torch.finfo(g.dtype).eps * abs(loss)
            trust = (loss - new_loss + rounding) / (trial.decrease + rounding)
            if trust < 0.25:
                radius = trial.norm / 4
            elif trust > 0.75 and trial.on_boundary:
                radius *= 2
            if trust > 0.1:
                loss, g = new_loss, new_g
            else:
                objective.point = point
            bar.set_postfix_str(f"loss {loss:.10f}, slope {g.abs().max():.1e}, {trial.status}")
            bar.update()
    seconds = time.perf_counter() - start
    slope = float(g.abs().max())
    return Run("Newton-CG", loss, slope, steps, objective.gradients, products, seconds)


def l_bfgs(objective: Objective, most: int = 5000) -> Run:
    """By torch, with its line search for the strong Wolfe conditions."""
    parameters = list(objective.model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=most, max_eval=2 * most, history_size=20,
        tolerance_grad=FLAT, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip
    start = time.perf_counter()
    with tqdm(desc="L-BFGS   ", unit=" gradients", mininterval=0.5) as bar:

        def closure() -> float:
            loss, g = objective.value_and_gradient()
            for p, entries in zip(
                parameters, g.split([p.numel() for p in parameters]), strict=True
            ):
                p.grad = entries.view_as(p)
            bar.set_postfix_str(f"loss {loss:.10f}, slope {g.abs().max():.1e}", refresh=False)
            bar.update()
            return loss

        optimizer.step(closure)
    seconds = time.perf_counter() - start
    steps, gradients = optimizer.state[parameters[0]]["n_iter"], objective.gradients
    loss, g = objective.value_and_gradient()
    return Run("L-BFGS", loss, float(g.abs().max()), steps, gradients, 0, seconds)


class Objective:
    """Cross entropy with weight decay, at the parameters that the model has."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.gradients = 0

    @property
    def point(self) -> Tensor:
        return parameters_to_vector(self.model.parameters()).detach().clone()

    @point.setter
    def point(self, flat: Tensor) -> None:
        vector_to_parameters(flat, self.model.parameters())

    def value(self) -> Tensor:
        weights = [p for name, p in self.model.named_parameters() if name.endswith("weight")]
        penalty = DECAY / 2 * sum(w.square().sum() for w in weights)
        return CROSS_ENTROPY(self.model(self.x), self.y) + penalty

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """The objective and its gradient ``(n,)``."""
        self.gradients += 1
        loss = self.value()
        gradient = torch.autograd.grad(loss, list(self.model.parameters()))
        return loss.item(), parameters_to_vector(gradient)


def warm_up(objective: Objective, steps: int) -> None:
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=0.01)
    for _ in tqdm(range(steps), desc="Adam     ", unit=" steps", mininterval=0.5):
        optimizer.zero_grad()
        objective.value().backward()
        optimizer.step()


@dataclass(frozen=True)
class Run:
    """Where a method ended, and what it took."""

    name: str
    loss: float
    slope: float  # the largest entry of the gradient
    steps: int
    gradients: int
    products: int
    seconds: float


def print_table(*runs: Run) -> None:
    print(
        f"\n{'':<10}{'loss':>16}{'slope':>10}{'steps':>8}{'gradients':>11}{'products':>10}{'seconds':>9}"
    )
    for run in runs:
        print(
            f"{run.name:<10}{run.loss:>16.12f}{run.slope:>10.1e}{run.steps:>8}{run.gradients:>11}"
            f"{run.products:>10}{run.seconds:>9.2f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    main()
