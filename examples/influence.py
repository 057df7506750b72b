"""Which training digits made the classifier misread this one? Influence, and whether it is true.

Influence functions (Hampel 1974; Koh and Liang 2017) predict what leaving training image ``i`` out
would do to the loss on a test image, without training again::

    g_test' (H + damping I)^-1 g_i / n

with gradients ``g`` and the Hessian ``H`` of the training loss. The damping is no trick here: it is
the weight decay that the model was trained with, so that ``H + damping I`` is the Hessian of what
was minimized. One solve serves all images. For the few with the largest influence the model is
trained again without each of them, and the loss on the test image is compared with the prediction.
The digits are drawn in ``output/influence.png``.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # the picture goes to a file and needs no display

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

from hvpop import HessianOperator, Identity
from hvpop.solvers import Inverse, cg

DAMPING = 3e-3


def main(few: int = 5, output: Path = Path("output")) -> list[LeftOut]:
    """The images most harmful and most helpful, left out; exit with a message if a check fails."""
    torch.manual_seed(0)
    train, test = digits()
    model = nn.Linear(64, 10).double()  # softmax regression: one minimum, so retraining has one end
    slope = fit(model, train, "training")
    x, y = misread(model, test)
    with torch.no_grad():
        read, before = int(model(x).argmax()), float(cross_entropy(model(x), y))
    print(f"a {int(y)} is read as a {read}; its loss is {before:.3f}")

    start = time.perf_counter()
    predicted, residual = influence(model, train, (x, y))
    seconds = time.perf_counter() - start
    order = predicted.argsort()
    chosen = torch.cat([order[:few], order[-few:].flip(0)])
    table = []
    for i in tqdm(chosen.tolist(), desc="retraining without one", unit=" images"):
        keep = torch.arange(len(train[1])) != i
        again = copy.deepcopy(model)
        fit(again, train, None, keep)
        with torch.no_grad():
            after = float(cross_entropy(again(x), y))
        table.append(LeftOut(i, int(train[1][i]), float(predicted[i]), after - before))

    print(f"influence of {len(predicted)} images from one solve, {seconds:.2f} s\n")
    print_table(table)
    draw(train, (x, y), read, predicted, table, output / "influence.png")
    print(f"\nThe digits are drawn in {output / 'influence.png'}")
    check(table, slope, residual)
    return table


def influence(model: nn.Module, train: Labelled, test: Labelled) -> tuple[Tensor, float]:
    """The predicted change of the test loss for each training image left out, ``(N,)``.

    With it the relative residual of the system that was solved.
    """
    x, y = train
    batches = list(zip(x.split(256), y.split(256), strict=True))
    H = HessianOperator(model, nn.CrossEntropyLoss(), batches).linearize()
    damped = H + DAMPING * Identity.like(H)
    inverse = Inverse(damped, solve=partial(cg, rtol=1e-8))

    g_test = parameters_to_vector(
        torch.autograd.grad(cross_entropy(model(test[0]), test[1]), list(model.parameters()))
    )
    s = inverse @ g_test
    residual = float((damped @ s - g_test).norm() / g_test.norm())

    # All the products g_i' s at once: they are the derivatives of the losses in the direction s.
    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, parameters, (x,)), y, reduction="none")

    point = {name: p.detach() for name, p in model.named_parameters()}
    _, slopes = jvp(losses, (point,), (H.layout.unflatten(s),))
    return slopes / len(y), residual


def check(table: list[LeftOut], slope: float, residual: float) -> None:
    """Predictions of the first order agree in sign, order and size with what happens."""
    predicted = torch.tensor([row.predicted for row in table])
    actual = torch.tensor([row.actual for row in table])
    correlation = float(torch.corrcoef(torch.stack([predicted, actual]))[0, 1])
    worst = float(((predicted - actual) / actual).abs().max())
    print(f"correlation {correlation:.3f}, off by {worst:.0%} at most")
    failed = []
    if not slope <= 1e-6:
        failed.append(f"training stopped at a slope of {slope:.1e}")
    if not residual <= 1e-7:
        failed.append(f"the solve has a residual of {residual:.1e}")
    if not bool((predicted * actual > 0).all()):
        failed.append("a prediction has the wrong sign")
    if not correlation >= 0.95:
        failed.append(f"predictions and changes correlate by {correlation:.3f} only")
    if not worst <= 0.4:
        failed.append(f"a prediction is off by {worst:.0%}")
    if failed:
        raise SystemExit("not as it must be: " + "; ".join(failed))


# -- data and training ---------------------------------------------------------------------------

Labelled = tuple[Tensor, Tensor]
"""Images ``(N, 64)`` in float64 and their classes ``(N,)``."""


@dataclass(frozen=True)
class LeftOut:
    """A training image, and what leaving it out does to the loss on the test image."""

    index: int
    label: int
    predicted: float
    actual: float


def digits() -> tuple[Labelled, Labelled]:
    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, classes, test_size=0.2, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return (train_x, train_y), (test_x, test_y)


def fit(
    model: nn.Module, train: Labelled, shown: str | None, keep: Tensor | slice = slice(None)
) -> float:
    """Minimize to the bottom, from where the model is; returns the largest entry of the gradient.

    The sum of losses is divided by the number of all images, kept or not: leaving one out takes
    its term away and leaves the weight of the others and of the decay as they were.
    """
    x, y = train
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, history_size=20, tolerance_grad=1e-7, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    bar = tqdm(desc=shown, unit=" gradients", disable=shown is None, mininterval=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = DAMPING / 2 * sum(p.square().sum() for p in parameters)
        loss = cross_entropy(model(x[keep]), y[keep], reduction="sum") / len(y) + decay
        loss.backward()
        bar.update()
        return loss

    optimizer.step(closure)
    closure()
    bar.close()
    slope = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    optimizer.zero_grad()
    return slope


def misread(model: nn.Module, test: Labelled) -> Labelled:
    """The test image that the model is most wrong about, ``(1, 64)``."""
    with torch.no_grad():
        i = int(cross_entropy(model(test[0]), test[1], reduction="none").argmax())
    return test[0][i : i + 1], test[1][i : i + 1]


# -- table and picture ---------------------------------------------------------------------------


def print_table(table: list[LeftOut]) -> None:
    print("left out         change of the test loss")
    print("image  digit     predicted        actual")
    for row in table:
        print(f"{row.index:>5}{row.label:>7}{row.predicted:>+14.4f}{row.actual:>+14.4f}")


def draw(
    train: Labelled,
    test: Labelled,
    read: int,
    predicted: Tensor,
    table: list[LeftOut],
    path: Path,
) -> None:
    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(2.0, 6, 3.6))
    axes = left.subplots()
    show(axes, test[0][0])
    axes.set_title(f"a {int(test[1])} of the test set,\nread as a {read}")
    half = len(table) // 2
    rows = middle.subfigures(2, 1)
    below = "Below each: change of its loss without it, predicted / actual"
    show_row(rows[0], f"Hurt most. {below}", train, table[:half])
    show_row(rows[1], f"Helped most. {below}", train, table[half:])
    draw_agreement(right.subplots(), predicted, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show_row(figure: SubFigure, title: str, train: Labelled, table: list[LeftOut]) -> None:
    figure.suptitle(title, fontsize=10)
    for axes, row in zip(figure.subplots(1, len(table), squeeze=False)[0], table, strict=True):
        show(axes, train[0][row.index])
        axes.set_title(f"a {row.label}", fontsize=10)
        axes.set_xlabel(f"{row.predicted:+.3f} / {row.actual:+.3f}", fontsize=8)


def show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def draw_agreement(axes: Axes, predicted: Tensor, table: list[LeftOut]) -> None:
    """Predicted against actual changes; a rug shows the predictions for all other images."""
    x, y = [row.predicted for row in table], [row.actual for row in table]
    ends = [1.1 * min(*x, *y), 1.1 * max(*x, *y)]
    axes.plot(ends, ends, color="0.6", lw=0.8)
    axes.text(ends[1], ends[1], "equal", color="0.5", ha="right", va="bottom", fontsize=9)
    axes.axhline(0, color="0.9", lw=0.8, zorder=0)
    axes.axvline(0, color="0.9", lw=0.8, zorder=0)
    axes.plot(x, y, "o", color="#1f5f99")
    axes.plot(
        predicted.tolist(), [0.02] * len(predicted), "|", color="#d1632a", ms=8, alpha=0.3,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    axes.text(
        0.98, 0.06, f"ticks: all {len(predicted)} training images", color="#d1632a", ha="right",
        fontsize=9, transform=axes.transAxes,
    )  # fmt: skip
    axes.set(xlabel="predicted", ylabel="after training again")
    axes.set_title("Change of its loss without one image", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    main()
