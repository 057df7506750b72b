"""Hold every op and layer of torch's own databases against differences of gradients: ``python -m tests.sweep.run``.

In processes of their own, since an op may crash or hang; half an hour on one core. Verdicts go to
output/sweep.jsonl, and those worth knowing into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 60  # for an op, all its samples
OUTPUT = Path("output") / "sweep.jsonl"


def main() -> None:
    args = _arguments()
    if args.work:
        work(args.work, args.samples, args.names)
        return
    OUTPUT.parent.mkdir(exist_ok=True)
    with OUTPUT.open("w", encoding="utf-8") as file:
        for database in ("ops", "layers"):
            for line in swept(database, args.samples, args.names):
                file.write(json.dumps(line) + "\n")
                file.flush()
                if line["verdict"] in ("wrong", "refused", "crashed"):
                    print(_words(line), flush=True)
    if not args.names:
        from .table import write

        write(OUTPUT)


def swept(database: str, samples: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Each verdict on a database; the worker is started again behind an op that ended it."""
    done: list[str] = []
    while True:
        current = None
        for line in _lines(database, samples, names, len(done)):
            if "begin" in line:
                current = line["begin"]
                done.append(current)
            elif "end" in line:
                return
            else:
                yield line
        yield {
            "name": current,
            "variant": "",
            "sample": 0,
            "verdict": "crashed",
            "rewritten": [],
            "detail": "the process ended, or took too long",
            "ways": {},
        }


def _lines(database: str, samples: int, names: list[str], skip: int) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.sweep.run", "--work", f"{database}:{skip}"]
    command += ["--samples", str(samples), *names]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := lines.get(timeout=2 * SECONDS)) is not None:
            if line.startswith("{"):
                yield json.loads(line)
    except queue.Empty:
        pass
    finally:
        worker.kill()
        worker.wait()


def work(where: str, samples: int, names: list[str]) -> None:
    """The worker: a line of JSON for each sample."""
    warnings.simplefilter("ignore")
    import torch

    from . import judge, problems

    torch.set_num_threads(1)
    database, _, skip = where.partition(":")
    entries = problems.ops() if database == "ops" else problems.layers()
    of = problems.of_op if database == "ops" else problems.of_layer
    entries = [e for e in entries if not names or e.name in names or e.formatted_name in names]
    for entry in entries[int(skip) :]:
        _say({"begin": entry.name})
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(SECONDS)
        try:
            for i, problem in enumerate(of(entry, samples)):
                _say(judge.judged(problem, trace=i == 0).as_dict())
        except Exception as error:
            broken = judge.Verdict(
                entry.name, "", 0, "no gradient", detail=f"no sample: {error!r:.200}"
            )
            _say(broken.as_dict())
        finally:
            signal.alarm(0)
    _say({"end": True})


def _late(number: int, frame: Any) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def _say(line: dict[str, Any]) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())


def _words(line: dict[str, Any]) -> str:
    return f"{line['name']} {line['variant']} {line['sample']}: {line['verdict']}: {line['detail']}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="ops or layers (default: all, and write the table)"
    )
    parser.add_argument("--samples", type=int, default=4, help="of each op (default: 4)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
