"""What a process of a world does."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch

from hvpop.distributed import init
from hvpop.distributed.errors import words


def run(
    module: str,
    name: str,
    args: tuple[Any, ...],
    settings: dict[str, str],
    data_timeout: float,
    end: Connection,
) -> None:
    """Join the world, do the work, and send how it ended."""
    os.environ.update(settings)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _quiet()
    outcome: dict[str, Any] = {}
    try:
        work = getattr(importlib.import_module(module), name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome["value"] = work(init(timeout=data_timeout), *args)
    except BaseException as error:
        cause = error.__cause__
        outcome |= {"error": type(error).__name__, "message": str(error)}
        outcome["cause"] = "" if cause is None else words(cause)
        if os.environ.get("HVPOP_TRACEBACK"):
            traceback.print_exc()
    end.send_bytes(pickle.dumps(outcome))
    end.close()
    os._exit(0)


def _quiet() -> None:
    """gloo tells of each connection on standard output."""
    if not os.environ.get("HVPOP_TRACEBACK"):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.stdout.flush()
