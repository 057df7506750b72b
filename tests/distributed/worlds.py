"""Small worlds of processes: made by a forkserver, each fresh, none of which can hang the suite."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

member = importlib.import_module("tests.distributed.member")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.distributed.preloaded"])


@dataclass
class Outcome:
    """How one process ended."""

    rank: int
    value: Any = None
    error: str = ""  # the class of what it raised
    message: str = ""
    cause: str = ""  # the class and words of what that came of
    killed: bool = False
    seconds: float = 0.0


def run(
    work: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 60.0,
    data_timeout: float = 30.0,
    **environment: str,
) -> list[Outcome]:
    """``work(team, *args)`` on each of some processes; those that take longer are killed, and fail."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, ends = [], []
    for rank in range(ranks):
        ours, theirs = SERVER.Pipe(duplex=False)
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, as torchrun's is
            "OMP_NUM_THREADS": "1",  # as torchrun sets it
            **environment,
        }
        # pytest's names of test modules are not those that another process finds them by
        place = f"tests.distributed.{work.__module__.rpartition('.')[2]}"
        target = (place, work.__name__, args, settings, data_timeout, theirs)
        process = SERVER.Process(target=member.run, args=target, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    start = time.monotonic()
    try:
        return _outcomes(ends, start, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _outcomes(ends: list[Connection], start: float, timeout: float) -> list[Outcome]:
    found: dict[int, Outcome] = {}
    while len(found) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in found]
        ready = wait(waiting, timeout=max(0.0, start + timeout - time.monotonic()))
        if not ready:
            late = sorted(set(range(len(ends))) - set(found))
            pytest.fail(f"ranks {late} have not ended in {timeout:g} s; others: {found}")
        for end in ready:
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                found[rank] = Outcome(rank, **pickle.loads(end.recv_bytes()))  # type: ignore[union-attr]
            except EOFError:
                found[rank] = Outcome(rank, killed=True)
            found[rank].seconds = time.monotonic() - start
    return [found[rank] for rank in range(len(ends))]


def values(outcomes: list[Outcome]) -> list[Any]:
    """What all have returned; fails with the words of those that have not."""
    failed = [o for o in outcomes if o.error or o.killed]
    assert not failed, "\n".join(f"rank {o.rank}: {o.error} {o.message} {o.cause}" for o in failed)
    return [o.value for o in outcomes]


def all_of(work: Callable[..., Any], ranks: int, *args: Any, **options: Any) -> list[Any]:
    """The values of `run`."""
    return values(run(work, ranks, *args, **options))
