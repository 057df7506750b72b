"""Large models on a GPU in one short run: products, solvers and memory, beside plain torch.

``python tests/benchmarks/gpu.py --output gpu.json`` takes four minutes at most, prints Markdown tables and writes
them as JSON after each part; a part that fails says why, and the next one goes on. ``--device cpu --small`` tries it out.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from large_models import resnet
from large_products import by_hand, gradient
from torch import Tensor, nn
from workloads import Decoder, Workload, cnn

from hvpop import Damped, Diagonal, FromFunction, HessianOperator, LinearOperator
from hvpop.solvers import cg
from hvpop.spectrum import eigsh, spectral_density, trace

Multiply = Callable[[Tensor], Tensor]


class OutOfTime(BaseException):
    """A part has had its share of the time."""


@dataclass
class Run:
    """Where it runs, for how long, and what has been found."""

    device: torch.device
    small: bool
    seconds: float
    output: Path | None
    record: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def both(
        self, mine: Callable[[], object], theirs: Callable[[], object], rounds: int
    ) -> tuple[float, float]:
        """Medians of the seconds of two calls, in turns, after one of each."""
        calls = (mine, theirs)
        seconds: tuple[list[float], list[float]] = ([], [])
        for r in range(-1, rounds):
            for i in (0, 1) if r % 2 else (1, 0):
                taken = self.timed(calls[i])
                if r >= 0 or rounds == 0:
                    seconds[i].append(taken)
        return statistics.median(seconds[0]), statistics.median(seconds[1])

    def memory(self, call: Callable[[], object]) -> tuple[float, float, object]:
        """GiB at the peak and after a call, beside what was allocated before, and what it gave."""
        gc.collect()
        if not self.cuda:
            return float("nan"), float("nan"), call()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = call()
        self.wait()
        gc.collect()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return (peak - before) / 2**30, (after - before) / 2**30, made

    def free(self) -> float:
        """GiB that are free on the device."""
        gc.collect()
        if not self.cuda:
            return float("nan")
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / 2**30

    @contextmanager
    def part(self, title: str, share: float) -> Iterator[Callable[..., None]]:
        """A table, within a share of the time that is left; gives what adds a row to it."""
        rows: list[dict[str, object]] = []

        def add(what: str, **numbers: object) -> None:
            rows.append({"": what, **numbers})
            print(f"  {what}: {numbers}", flush=True)

        left = self.seconds - (time.perf_counter() - self.started)
        print(f"\n### {title}, within {share * left:.0f} s", flush=True)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, share * left))
        try:
            yield add
        except (Exception, OutOfTime):
            add(traceback.format_exc().splitlines()[-1])
            traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.record[title] = rows
            if self.output is not None:
                self.output.write_text(json.dumps(self.record, indent=1))
            if self.cuda:
                gc.collect()
                torch.cuda.empty_cache()


def alarm(*_: object) -> None:
    raise OutOfTime


# -- by hand ---------------------------------------------------------------------------------------


def plain_lanczos(multiply: Multiply, n: int, products: int, device: torch.device) -> None:
    """Runs of 20 steps, each vector made orthogonal to those before once."""
    Q = torch.empty(20, n, device=device)
    for done in range(0, products, 20):
        Q[0].normal_().div_(Q[0].norm())
        for j in range(min(20, products - done)):
            w = multiply(Q[j])
            w = w - (Q[: j + 1] @ w) @ Q[: j + 1]
            norm = float(w.norm())
            if j < 19:
                torch.div(w, norm, out=Q[j + 1])


def plain_cg(multiply: Multiply, b: Tensor, products: int) -> None:
    x, r = torch.zeros_like(b), b.clone()
    p, rho = r.clone(), float(r @ r)
    for _ in range(products):
        y = multiply(p)
        step = rho / float(p @ y)
        x.add_(p, alpha=step)
        r.sub_(y, alpha=step)
        rho, last = float(r @ r), rho
        p = r + (rho / last) * p


def plain_trace(multiply: Multiply, n: int, products: int, device: torch.device) -> None:
    for _ in range(products):
        z = torch.randint(0, 2, (n,), device=device).float() * 2 - 1
        float(z @ multiply(z))


def plain_quadrature(multiply: Multiply, n: int, steps: int, device: torch.device) -> None:
    v, last, beta = torch.randn(n, device=device), torch.zeros(n, device=device), 0.0
    v /= v.norm()
    for _ in range(steps):
        w = multiply(v) - beta * last
        w = w - (w @ v) * v
        beta = float(w.norm())
        last, v = v, w / beta


# -- parts -----------------------------------------------------------------------------------------


def gpt2(small: bool) -> Workload:
    """124 M: 12 layers of 768, 50,257 tokens, head and embedding tied; 2 batches of 2 x 512 tokens."""
    torch.manual_seed(0)
    words, length = (97, 16) if small else (50257, 512)
    model = Decoder(words, length, *((32, 2, 2) if small else (768, 12, 12)))
    nn.init.normal_(model.token.weight, std=0.02)
    model.head.weight = model.token.weight
    data = []
    for _ in range(2):
        text = torch.randint(words, (2, length + 1))
        data.append((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return Workload("gpt", "GPT, 2 batches of 2 x 512 tokens", model, nn.CrossEntropyLoss(), data)


def on_device(workload: Workload, device: torch.device) -> Workload:
    data = [(x.to(device), y.to(device)) for x, y in workload.data]
    return replace(workload, model=workload.model.to(device), data=data)


def products(run: Run, workload: Workload) -> None:
    """One model: the products, what is kept, and what solvers make of them."""
    workload = on_device(workload, run.device)
    n = workload.parameters
    vector = 4 * n / 2**30
    v = torch.randn(n, device=run.device)
    live = HessianOperator(workload.model, workload.loss, workload.data)

    def linearized() -> LinearOperator:
        return live.linearize(memory="30GiB")

    title = f"{workload.title}: {n:,} parameters"
    with run.part(f"{title}, memory in GiB", 0.25) as add:
        for warm in (lambda: linearized() @ v, lambda: by_hand(workload)(v)):
            warm()  # what libraries allocate once
        free = run.free()
        for who, make in (
            ("hvpop", lambda: linearized().matvec),
            ("by hand", lambda: by_hand(workload)),
        ):

            def first(make: Callable[[], Multiply] = make) -> tuple[Multiply, Tensor]:
                product = make()
                return product, product(v)

            peak, kept, made = run.memory(first)
            product, y = made  # type: ignore[misc]
            again, _, _ = run.memory(lambda m=product: m(v))
            if who == "hvpop":
                mine = y
            else:
                apart = float((mine - y).norm() / y.norm())
            add(who, kept=kept - vector, peak_of_first=peak, peak_of_later=again, free=free)
            del product, y, made
        add(f"relative distance of the products: {apart:.1e}")
        peak, _, _ = run.memory(lambda: live @ v)
        add("hvpop live", kept=0.0, peak_of_first=peak, peak_of_later=peak, free=free)
        del mine

    with run.part(f"{title}, seconds", 0.35) as add:

        def row(what: str, mine: float, theirs: float, **more: object) -> None:
            add(what, hvpop=mine, by_hand=theirs, ratio=mine / theirs, **more)

        A, multiply = linearized(), by_hand(workload)
        unit = run.both(gradient(workload), gradient(workload), 3)[0]
        add("gradient", by_hand=unit)
        row("live", *run.both(lambda: live @ v, lambda: by_hand(workload)(v), 3))
        row(
            "first product after linearize()",
            *run.both(lambda: linearized() @ v, lambda: by_hand(workload)(v), 5),
        )
        later, hand = run.both(lambda: A @ v, lambda: multiply(v), 9)
        row("later product", later, hand, gradients=later / unit)
        V = A.space.random(lambda c: c.normal_(), 8)
        row(
            "8 columns",
            *run.both(lambda: A @ V, lambda: [multiply(V[:, i]) for i in range(8)], 1),
        )
        add(str(A.report()).splitlines()[0])

    with run.part(f"{title}, seconds a product in solvers", 0.5) as add:

        def solved(what: str, mine: Callable[[], Any], theirs: Callable[[int], object]) -> Any:
            found: list[Any] = []
            peak, _, _ = run.memory(lambda: found.append(mine()))
            count = found[0].products
            ours, plain = run.both(mine, lambda: theirs(count), 1)
            add(
                what,
                hvpop=ours / count,
                by_hand=plain / count,
                ratio=ours / plain,
                products=count,
                status=found[0].status,
                peak_in_vectors=peak / vector,
            )
            return found[0]

        pairs = solved(
            "eigsh(k=2), 30 products at most",
            lambda: eigsh(A, 2, rtol=1e-2, max_products=30),
            lambda count: plain_lanczos(multiply, n, count, run.device),
        )
        add(f"eigenvalues {pairs.eigenvalues.tolist()}, residuals {pairs.residuals.tolist()}")
        damping = 2 * float(pairs.eigenvalues.abs().max())
        solved(
            "cg, 8 steps at most",
            lambda: cg(Damped(A, damping), v, rtol=1e-6, max_steps=8),
            lambda count: plain_cg(lambda x: multiply(x) + damping * x, v, count),
        )


def known(run: Run, sizes: tuple[int, ...]) -> None:
    """`eigsh` in float32 where the two largest eigenvalues are 8 and 10, their vectors spread over all entries."""
    for n in sizes:
        with run.part(f"eigsh(k=2) on a known matrix, n = {n:,}", 0.3) as add:
            A = of_known_spectrum(n, run.device)
            found: list[Any] = []
            peak, _, _ = run.memory(lambda A=A, found=found: found.append(eigsh(A, 2)))
            seconds = run.timed(lambda A=A: eigsh(A, 2))
            add(
                found[0].status,
                eigenvalues=", ".join(f"{x:.6f}" for x in found[0].eigenvalues.tolist()),
                products=found[0].products,
                seconds=seconds,
                peak_in_vectors=peak / (4 * n / 2**30),
                free=run.free(),
            )


def of_known_spectrum(n: int, device: torch.device) -> LinearOperator:
    """``8 q q' + 10 p p' + P D P``: ``P`` projects on what is orthogonal to both, ``D`` is in [0, 1]."""
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randint(0, 2, (n,), device=device, generator=generator).float() * 2 - 1
    p = q.clone()
    p[1::2] *= -1  # n is even: orthogonal, exactly
    d = torch.rand(n, device=device, generator=generator)

    def parts(v: Tensor) -> list[Tensor]:
        return [(s * v).sum(dtype=torch.float64) / n for s in (q, p)]

    def times(V: Tensor) -> Tensor:
        Y = torch.empty_like(V)
        for v, y in zip(V.T, Y.T, strict=True):
            a, b = parts(v)
            torch.mul(d, v - a * q - b * p, out=y)
            c, e = parts(y)
            y.add_(q * (8 * a - c)).add_(p * (10 * b - e))
        return Y

    return FromFunction(times, (n, n), dtype=torch.float32, device=device, symmetric=True)


def overheads(run: Run, sizes: tuple[int, ...]) -> None:
    """What is beside the products of a diagonal, for each of them, in milliseconds."""
    for n in sizes:
        with run.part(f"beside the product, n = {n:,}, in ms", 0.5) as add:
            generator = torch.Generator(run.device).manual_seed(0)
            d = torch.rand(n, device=run.device, generator=generator) + 0.1
            d[n // 2], d[n // 3] = 1.1001, 1.1002
            A = Diagonal(d)
            b = torch.randn(n, device=run.device, generator=generator)

            def loop(b: Tensor = b, d: Tensor = d) -> None:
                for _ in range(50):
                    d * b

            price = run.both(loop, loop, 5)[0] / 50
            asked: dict[str, tuple[Callable[[], Any], Callable[[int], object]]] = {
                "eigsh(k=2)": (
                    lambda A=A: eigsh(A, 2, rtol=1e-9, max_products=60),
                    lambda k, d=d, n=n: plain_lanczos(lambda v: d * v, n, k, run.device),
                ),
                "cg": (
                    lambda A=A, b=b: cg(A, b, rtol=1e-30, max_steps=40),
                    lambda k, d=d, b=b: plain_cg(lambda v: d * v, b, k),
                ),
                "trace": (
                    lambda A=A: trace(A, rtol=None, max_products=64),
                    lambda k, d=d, n=n: plain_trace(lambda v: d * v, n, k, run.device),
                ),
                "density": (
                    lambda A=A: spectral_density(A, steps=16, max_products=16, block=1),
                    lambda k, d=d, n=n: plain_quadrature(lambda v: d * v, n, k, run.device),
                ),
            }
            for what, (mine, theirs) in asked.items():
                count = mine().products
                ours, plain = run.both(mine, lambda f=theirs, k=count: f(k), 7)
                a, b_ = ours / count - price, plain / count - price
                add(what, hvpop=1e3 * a, by_hand=1e3 * b_, ratio=a / b_, products=count)
            V = A.space.random(lambda c: c.normal_(), 8)
            ours, plain = run.both(
                lambda A=A, V=V: A @ V, lambda A=A, V=V: [A @ V[:, i] for i in range(8)], 9
            )
            add("a block of 8, beside 8", hvpop=1e3 * ours, by_hand=1e3 * plain, ratio=ours / plain)


# -- tables ----------------------------------------------------------------------------------------


def markdown(record: dict[str, Any]) -> str:
    lines = [f"{record['device']}, torch {record['torch']}, float32 without TF32"]
    for title, rows in record.items():
        if not isinstance(rows, list):
            continue
        keys = list(dict.fromkeys(key for row in rows for key in row if key))
        lines += ["", f"### {title}", "", *_lines([[""] + [key.replace("_", " ") for key in keys]])]
        lines += ["|" + " --- |" * (len(keys) + 1)]
        lines += _lines([[row[""], *(row.get(key, "") for key in keys)] for row in rows])
    return "\n".join(lines)


def _lines(rows: list[list[Any]]) -> list[str]:
    cells = ([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows)
    return ["| " + " | ".join(row) + " |" for row in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for trying it out")
    parser.add_argument("--seconds", type=float, default=240.0, help="in all (default: 240)")
    parser.add_argument("--output", type=Path, help="where the numbers go as JSON")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    signal.signal(signal.SIGALRM, alarm)
    run = Run(torch.device(args.device), args.small, args.seconds, args.output)
    name = torch.cuda.get_device_name() if run.cuda else "cpu"
    run.record |= {"device": name, "torch": torch.__version__, "free": run.free()}
    known(run, (10_000, 20_000) if args.small else (1_000_000, 11_500_000, 124_000_000))
    overheads(run, (20_000,) if args.small else (2_000_000, 11_000_000))
    products(run, cnn() if args.small else resnet(samples=128))
    products(run, gpt2(args.small))
    print("\n" + markdown(run.record))
    print(f"\n{time.perf_counter() - run.started:.0f} s")


if __name__ == "__main__":
    main()
