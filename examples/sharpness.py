"""The curvature of the loss while a network is trained: sharpness, trace and density.

Gradient descent with a constant step ``eta`` does what a quadratic loss would not allow (Cohen et al.
2021): the largest eigenvalue of the Hessian, the sharpness, rises until it is ``2 / eta``, the most
that descent on a quadratic bears, and stays near it while the loss goes on falling. Here this is
watched on handwritten digits, cheaply: each search for the eigenvalue starts from the eigenvector
found before. At the end everything is compared with the dense Hessian. The picture is
``output/sharpness.png``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # the picture goes to a file and needs no display

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import SubFigure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from hvpop import HessianOperator
from hvpop.plotting import plot_density
from hvpop.spectrum import Density, Eigenpairs, Estimate, eigsh, spectral_density, trace

MSE = nn.MSELoss()
STEP = 0.6
ACCURACY = 1e-2  # residual of an eigenpair over its eigenvalue; the eigenvalue's error is less


def main(steps: int = 2000, every: int = 20, output: Path = Path("output")) -> Course:
    """Print and return what was seen; exit with a message if it is not as it must be."""
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[:500] / 16), one_hot(torch.from_numpy(classes[:500]), 10)
    y = y.double()
    model = nn.Sequential(
        nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10)
    ).double()
    H = HessianOperator(model, MSE, [(x, y)])  # follows the parameters

    begin = time.perf_counter()
    first = density(H)
    course = train(model, H, x, y, steps, every)
    A = H.linearize()
    last, top = density(H), eigsh(A, k=10, v0=course.vector)
    seconds = time.perf_counter() - begin
    draw(course, first, last, top, output / "sharpness.png")

    n, trials = A.shape[0], len(course.sharpness)
    print(f"{A!r}: {steps} steps of gradient descent, watched {trials} times, {seconds:.1f} s")
    print(f"the sharpness, {trials} times: {course.warm} products warm, {course.cold} cold")
    print(f"{last}\nThe course is drawn in {output / 'sharpness.png'}\n")
    check(course, last, torch.linalg.eigvalsh(A.to_dense()), n)
    return course


@dataclass
class Course:
    """What was seen, and at which steps."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    trace_steps: list[int] = field(default_factory=list)
    traces: list[Estimate] = field(default_factory=list)
    vector: Tensor | None = None  # (n, 1), the last eigenvector found
    warm: int = 0  # products, each search started from the vector before ...
    cold: int = 0  # ... or from a random one


def train(
    model: nn.Module, H: HessianOperator, x: Tensor, y: Tensor, steps: int, every: int
) -> Course:
    """Gradient descent; the sharpness every few steps, the trace at each fifth of these times."""
    optimizer = torch.optim.SGD(model.parameters(), lr=STEP)
    course = Course()
    with tqdm(total=steps, desc="gradient descent", unit=" steps", mininterval=0.5) as bar:
        for step in range(steps + 1):
            optimizer.zero_grad()
            loss = MSE(model(x), y)
            loss.backward()
            if step % every == 0:
                course.steps.append(step)
                course.losses.append(loss.item())
                watch(H, course, with_trace=step % (5 * every) == 0)
                bar.set_postfix_str(f"loss {loss:.4f}, sharpness {course.sharpness[-1]:.3f}")
            if step < steps:
                optimizer.step()
                bar.update()
    return course


def watch(H: HessianOperator, course: Course, with_trace: bool) -> None:
    A = H.linearize()
    warm = eigsh(A, k=1, rtol=ACCURACY, v0=course.vector)
    cold = eigsh(A, k=1, rtol=ACCURACY)  # only to see what the warm start is worth
    course.vector = warm.eigenvectors
    course.sharpness.append(warm.eigenvalues[-1].item())
    course.warm += warm.products
    course.cold += cold.products
    if with_trace:
        course.trace_steps.append(course.steps[-1])
        course.traces.append(trace(A, rtol=0.05))


def density(H: HessianOperator) -> Density:
    return spectral_density(H, steps=50, max_products=400)


# -- what it must be -----------------------------------------------------------------------------


def check(course: Course, last: Density, truth: Tensor, n: int) -> None:
    """Hold everything against all eigenvalues ``truth``, ``(n,)``, of the dense Hessian."""
    smooth = -((last.grid[:, None] - truth) ** 2) / (2 * last.width**2)
    exact = smooth.exp().mean(1) / (last.width * (2 * torch.pi) ** 0.5)
    apart = torch.trapezoid((last.value - exact).abs(), last.grid).item() / 2
    late = torch.tensor(course.sharpness[-len(course.sharpness) // 4 :])
    estimate, exact_trace = course.traces[-1], truth.sum().item()
    half = (estimate.high - estimate.low) / 2
    rows = [
        ("sharpness at the end, relative error", course.sharpness[-1] / truth[-1].item() - 1, 1e-3),
        ("trace at the end, error in half-bands", (estimate.value - exact_trace) / half, 2.0),
        ("density at the end, misplaced share", apart, 0.05),
        ("sharpness late on, mean over 2 / eta, less 1", late.mean().item() * STEP / 2 - 1, 0.1),
        # both look for what a start may have missed; a given one has seen nothing of it itself
        ("products, warm over cold", course.warm / course.cold, 1.1),
        ("loss at the end over loss at the start", course.losses[-1] / course.losses[0], 0.2),
    ]
    print(f"{'':<46}{'found':>10}{'at most':>9}")
    for what, found, most in rows:
        print(f"{what:<46}{found:>10.2g}{most:>9g}{'' if abs(found) <= most else '  FAILED'}")
    failed = [what for what, found, most in rows if not abs(found) <= most]
    if failed:
        raise SystemExit("not as it must be: " + "; ".join(failed))


# -- the picture ---------------------------------------------------------------------------------


def draw(course: Course, first: Density, last: Density, top: Eigenpairs, path: Path) -> None:
    figure = plt.figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    draw_course(left, course)
    above, below = right.subplots(2, 1, sharex=True, sharey=True)
    plot_density(first, ax=above)
    plot_density(last, top, ax=below)
    above.set_title("Density of the eigenvalues at the start")
    below.set_title("Density of the eigenvalues at the end")
    above.set_xlabel("")
    grid = torch.cat([first.grid, last.grid])
    below.set_xlim(grid.min().item(), grid.max().item())
    below.set_ylim(top=3 * max(first.value.max().item(), last.value.max().item()))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_course(figure: SubFigure, course: Course) -> None:
    loss, sharpness, sums = figure.subplots(3, 1, sharex=True)
    loss.semilogy(course.steps, course.losses, color="#1f5f99")
    loss.set_title(f"Gradient descent with step {STEP} on 500 digits: training loss")
    bound = 2 / STEP
    sharpness.plot(course.steps, course.sharpness, color="#1f5f99")
    sharpness.axhline(bound, color="0.4", ls="--", lw=0.9)
    sharpness.text(0, bound * 1.01, "2 / step", color="0.4", va="bottom")
    sharpness.set_ylim(0, 1.15 * max(*course.sharpness, bound))
    warm, cold = course.warm / len(course.steps), course.cold / len(course.steps)
    sharpness.set_title(f"Largest eigenvalue: {warm:.1f} products warm, {cold:.1f} cold")
    sums.fill_between(
        course.trace_steps, [t.low for t in course.traces], [t.high for t in course.traces],
        color="#1f5f99", alpha=0.25, lw=0,
    )  # fmt: skip
    sums.plot(course.trace_steps, [t.value for t in course.traces], ".-", color="#1f5f99")
    sums.set_ylim(bottom=0)
    sums.set_title("Trace, with its 95 % band")
    sums.set_xlabel("step")
    for axes in (loss, sharpness, sums):
        axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    main()
