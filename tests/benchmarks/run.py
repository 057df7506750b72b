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
import report
import scaling
import torch
from contests import Plan, Row
from workloads import WORKLOADS, Workload

CONTESTS: dict[str, tuple[Callable[[Workload, Plan], list[Row]], ...]] = {
    "tiny": (contests.one_product, contests.sixteen_columns),
    "mlp": (contests.one_product, contests.sixteen_columns),
    "cnn": (contests.one_product, contests.sixteen_columns),
    "gpt": (contests.one_product, contests.sixteen_columns),
    "digits": (contests.end_to_end, *answers.QUESTIONS),
    "memory": (contests.within_memory,),
}


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
        workload = WORKLOADS[name]()
        for contest in CONTESTS[name]:
            found = contest(workload, plan)
            rows += found
            print(report.table(workload.title, found), flush=True)
    print(report.targets(rows))
    if args.scaling:
        curves = scaling.measured(plan)
    rows += [row for row in kept if row.workload not in args.workloads]
    rows.sort(key=lambda row: list(WORKLOADS).index(row.workload))
    report.save(rows, curves, args.output)
    print(f"written: {args.output}/benchmarks.json and pictures beside it")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workloads", type=_names, default=list(WORKLOADS), help="some of " + ",".join(WORKLOADS)
    )
    parser.add_argument("--repeats", type=int, help="rounds (15; with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="few rounds, no compiler")
    parser.add_argument("--no-compiler", action="store_true", help="leave TorchInductor out")
    parser.add_argument(
        "--no-scaling", dest="scaling", action="store_false", help="no scaling plot"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of this thread, not of the clock on the wall"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep what --output has of other workloads"
    )
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(WORKLOADS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    main()
