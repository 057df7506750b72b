"""Measure hvpop against its peers: ``python tests/benchmarks/run.py --help``."""

from __future__ import annotations

import os

# One thread, for BLAS too; it reads these when it is loaded.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path

import answers
import contests
import large
import report
import scaling
import torch
from contests import Plan, Row
from workloads import WORKLOADS, Workload

PRODUCTS = (contests.one_product, contests.sixteen_columns, contests.gauss_newton)

CONTESTS: dict[str, tuple[Callable[[Workload, Plan], list[Row]], ...]] = {
    "tiny": PRODUCTS,
    "mlp": PRODUCTS,
    "cnn": PRODUCTS,
    "gpt": PRODUCTS,
    "digits": (contests.end_to_end, *answers.QUESTIONS),
    "memory": (contests.within_memory,),
}

PARTS = [*WORKLOADS, large.NAME]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of peers
    plan = Plan(
        repeats=args.repeats or (3 if args.quick else 15),
        clock=time.thread_time if args.cpu_time else time.perf_counter,
        compiler=not (args.quick or args.no_compiler),
        sizes=(1, 2, 4) if args.quick else Plan.sizes,
    )
    kept, curves = report.load(args.output) if args.add else ([], [])
    rows: list[Row] = []
    for name in args.workloads:
        if name == large.NAME:
            for found in large.measured(plan):
                rows += found
                print(report.table("float32", found), flush=True)
            continue
        workload = WORKLOADS[name]()
        for contest in CONTESTS[name]:
            found = contest(workload, plan)
            rows += found
            print(report.table(workload.title, found), flush=True)
    print(report.targets(rows))
    if args.scaling:
        curves = scaling.measured(plan)
    rows += [row for row in kept if row.workload not in args.workloads]
    rows.sort(key=lambda row: PARTS.index(row.workload))
    report.save(rows, curves, args.output)
    print(f"written: {args.output}/benchmarks.json and pictures beside it")


DESCRIPTION = """Time hvpop against its peers, check every answer, and write tables and pictures.

Without options it takes about half an hour, on one thread of the processor. Peers that are not installed are
listed as such; `make bench` installs them first, then runs this."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument(
        "--workloads",
        type=_names,
        default=list(WORKLOADS),
        metavar="NAME,NAME",
        help=f"separated by commas, of {', '.join(PARTS)} (default: all but {large.NAME})",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="ROUNDS",
        help="rounds, in each of which everyone is timed (default: 15; with --quick 3)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="for a first look: few rounds, small sizes in the scaling plot, --no-compiler",
    )
    parser.add_argument(
        "--no-compiler",
        action="store_true",
        help="leave out `hvpop, Compiled`, which TorchInductor compiles to C++ first",
    )
    parser.add_argument(
        "--no-scaling",
        dest="scaling",
        action="store_false",
        help="do not measure how the cost of a product grows with batches and parameters",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the processor time of this thread (default: the time that passes)",
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep from an earlier run in the folder --output the results of workloads that "
        "--workloads does not name (default: overwrite all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="FOLDER",
        help="where benchmarks.json and the pictures go (default: output)",
    )
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    main()
