"""A program whose processes end as any do, and destroy no group: python -m tests.distributed.ending PAIRS"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from hvpop.distributed import init


def told(whose: str) -> None:
    """After all that was registered later."""
    assert dist.is_initialized() == (whose == "the user's")
    if dist.is_initialized():
        dist.destroy_process_group()  # which is for the user to do
    print("left")


def member(whose: str, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    if whose == "the user's":
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    atexit.register(told, whose)
    team = init(timeout=20.0)
    for _ in range(3):
        team.add_up(torch.ones(100_000))


def main(pairs: int) -> None:
    for pair in range(pairs):
        whose = "the user's" if pair % 2 else "hvpop's"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        children = []
        for rank in (0, 1):
            child = os.fork()
            if not child:
                signal.alarm(100)  # one that does not end is killed
                member(whose, rank, port)
                return
            children.append(child)
        for child in children:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
