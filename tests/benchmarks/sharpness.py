"""The sharpness of the ResNet-18 through training, each search warm from the step before: products, time, memory.

``python tests/benchmarks/sharpness.py --picture docs/images/resnet-sharpness.png`` records 20 steps; minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from large_products import resident, seconds

import torch  # isort: skip
from large_models import resnet

from hvpop import HessianOperator
from hvpop.spectrum import eigsh

STEP = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    workload = resnet(1, args.samples)
    model, loss, ((x, y),) = workload.model.train(), workload.loss, workload.data
    vectors = 4 * workload.parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=STEP, momentum=0.9)
    H = HessianOperator(model, loss, workload.data)
    print("step   loss  sharpness  products  s a product  gradients  kept MiB  after, n  peak, n")
    rows: list[tuple[float, float, int, float]] = []
    vector = None

    def search() -> None:
        nonlocal vector, found, A
        A = H.linearize(memory="4GiB")
        found = eigsh(A, k=1, rtol=1e-2, v0=vector)
        vector = found.eigenvectors

    def descend() -> None:
        nonlocal value
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()

    found = A = value = None
    for i in range(args.steps):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        a_search, a_gradient = seconds(search), seconds(descend)
        optimizer.step()
        each = a_search / found.products
        rows.append((value.item(), float(found.eigenvalues[-1]), found.products, each))
        peak, after = peak_resident() / vectors, resident() / vectors
        print(
            f"{i:4} {rows[-1][0]:6.3f} {rows[-1][1]:10.2f} {found.products:9} {each:12.2f} "
            f"{each / a_gradient:10.2f} {A.report().bytes / 2**20:9.1f} {after:9.1f} {peak:8.1f}"
            f"  {found.status}",
            flush=True,
        )
    if args.picture is not None:
        draw(rows, args.picture)


def peak_resident() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def draw(rows: list[tuple[float, float, int, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    losses, sharpness, products, _ = zip(*rows, strict=True)
    figure, (above, middle, below) = plt.subplots(
        3, 1, figsize=(7, 7), sharex=True, layout="constrained"
    )
    above.plot(losses, ".-", color="#1f5f99")
    above.set_title("Training loss of a ResNet-18")
    middle.plot(sharpness, ".-", color="#1f5f99")
    middle.set_title("Largest eigenvalue of the Hessian")
    below.bar(range(len(rows)), products, color="#9dbfdd")
    below.set_title("Products of the search, warm from the step before")
    below.set_xlabel("step")
    below.set_xticks(range(0, len(rows), 5))
    for axes in (above, middle, below):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
