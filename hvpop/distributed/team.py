"""The processes that work on one matrix: their groups, what they say to each other, who is missing."""

from __future__ import annotations

import atexit
import os
import pickle
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
import torch.distributed as _dist
from torch import Tensor

from .. import _torch
from .errors import RankLost, RemoteError

dist: Any = _dist  # stores are not among the names that it says it exports

TIMEOUT = 1800.0
"""Seconds that a process waits for the others within a product."""

_IDLE = timedelta(days=30)  # of the control group: a leader may think for long

_LOOK = timedelta(seconds=0.5)
"""How often a process that waits looks whether others have given up."""

_NAMING = 4.0
"""Seconds at most that survivors wait for each other to tell who is missing; some `_LOOK`."""


@dataclass
class Traffic:
    """What a process has sent and waited for."""

    collectives: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, now: Traffic, before: Traffic) -> None:
        """Count what has been added between two moments."""
        self.collectives += now.collectives - before.collectives
        self.bytes += now.bytes - before.bytes
        self.seconds += now.seconds - before.seconds


class Team:
    """Some processes with a group for data, one for commands, and a store; made by `init`.

    Attributes
    ----------
    rank, size : int
        Which process this is, of how many.
    traffic : Traffic
        What this process has sent, and how long it has waited, in all.
    """

    def __init__(self, store: Any, timeout: float, data: Any = None, control: Any = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store, self.timeout = store, timeout
        self.data, self.control = data, control
        self.traffic = Traffic()
        self.steps = 0  # of all products, on all processes alike
        self.leading = False  # whether this process drives the others, now
        self._members: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._count = 0
        self._world = ref(dist.group.WORLD)
        self._waits = 0  # that are not over: one that is interrupted goes on in its thread
        self.lost: RankLost | None = None

    @property
    def current(self) -> bool:
        """Whether torch.distributed is still what it was when the team was made."""
        return dist.is_initialized() and self._world() is dist.group.WORLD

    @property
    def per_node(self) -> int:
        """How many of the processes share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def joined(self, operator: Any) -> int:
        """The number of an operator that all processes have made, in the same order."""
        self._count += 1
        self._members[self._count] = operator
        return self._count

    def member(self, number: int) -> Any:
        """The operator of a number."""
        return self._members[number]

    # -- data -------------------------------------------------------------------------------------

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place, with the same bits on all of them (with gloo)."""
        return self._sent(tensor, dist.all_reduce)

    def add_up_at(self, tensor: Tensor, rank: int) -> Tensor:
        """The sum over processes, in place, at one of them; elsewhere nothing of use."""
        return self._sent(tensor, dist.reduce, rank)

    def smallest(self, tensor: Tensor) -> Tensor:
        """The smallest over processes, in place."""
        return self._sent(tensor, dist.all_reduce, dist.ReduceOp.MIN)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over processes, in place."""
        return self._sent(tensor, dist.all_reduce, dist.ReduceOp.MAX)

    def side_by_side(self, tensor: Tensor) -> Tensor:
        """Those of all processes, in the order of ranks: ``(size, *shape)``."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        found = tensor.new_empty(self.size, *tensor.shape)
        flat = found.view(-1)  # one piece of memory: lists of tensors are copied once more
        self._sent(tensor.contiguous().view(-1), _torch.all_gather(), flat, first=True)
        return found

    def share(self, tensor: Tensor, rank: int) -> Tensor:
        """What one process has, in place."""
        return self._sent(tensor, dist.broadcast, rank)

    def _sent(
        self, tensor: Tensor, send: Callable[..., Any], *how: Any, first: bool = False
    ) -> Tensor:
        """Send ``tensor``, the first argument of ``send`` unless ``how`` comes first."""
        if self.size > 1:
            self.traffic.collectives += 1
            self.traffic.bytes += tensor.nbytes
            self._waiting(send, self.data, *((*how, tensor) if first else (tensor, *how)))
        return tensor

    # -- words ------------------------------------------------------------------------------------

    def everyone(self, thing: Any) -> list[Any]:
        """What each process says, in the order of ranks."""
        if self.size == 1:
            return [thing]
        text = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._waiting(dist.all_gather, self.control, sizes, torch.tensor([len(text)]))
        longest = max(map(int, sizes))
        padded = torch.nn.functional.pad(text, (0, longest - len(text)))
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        self._waiting(dist.all_gather, self.control, texts, padded)
        return [pickle.loads(t.numpy().tobytes()) for t in texts]  # which ends by itself

    def command(self, thing: Any = None) -> Any:
        """What the leader, rank 0, says; others wait for it as long as it takes."""
        if self.size == 1:
            return thing
        said = pickle.dumps(thing) if self.rank == 0 else b""
        size = torch.tensor([len(said)])
        self._waiting(dist.broadcast, self.control, size, 0)
        text = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            text = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        self._waiting(dist.broadcast, self.control, text, 0)
        return pickle.loads(text.numpy().tobytes())

    def say(self, key: str, text: str) -> None:
        """Leave words for the others, before they are told that there are any."""
        self.store.set(f"{self.steps}/{key}/{self.rank}", text)

    def said(self, key: str, rank: int) -> str:
        """The words that a process has left at this step."""
        found: bytes = self.store.get(f"{self.steps}/{key}/{rank}")
        return found.decode()

    def warn(self, category: type[Warning], text: str) -> None:
        """Warn on rank 0; elsewhere not, unless the user's filters make errors of warnings."""
        with warnings.catch_warnings(record=True) if self.rank else nullcontext():
            warnings.warn(text, category, stacklevel=2)

    def refuse(self, rank: int, cause: BaseException | None = None) -> RemoteError:
        """The error that every process raises, in the words of the one that failed."""
        error = RemoteError(rank, f"rank {rank} of {self.size}: {self.said('error', rank)}")
        error.__cause__ = cause
        return error

    # -- faults -----------------------------------------------------------------------------------

    def _waiting(self, send: Callable[..., Any], group: Any, *what: Any) -> None:
        if self.lost is not None:
            raise self.lost
        start = time.perf_counter()
        self._waits += 1
        try:
            handle = send(*what, group=group, async_op=True)
            self._until_done(handle)
            self._waits -= 1
        except RuntimeError as error:
            limit = self.timeout if group is self.data else torch.inf
            self.lost = self._named(error, late=time.perf_counter() - start >= 0.9 * limit)
            raise self.lost from error
        finally:
            self.traffic.seconds += time.perf_counter() - start

    def _until_done(self, handle: Any) -> None:
        """Wait, and look now and then whether others have given up: not all notice by themselves."""
        while True:
            try:
                handle.wait(_LOOK)
                return
            except RuntimeError:
                if handle.is_completed() or self.store.check(["why"]):
                    raise

    def leave(self, world: bool) -> None:
        """Destroy the groups that were made for the team, at the end of a program; all if the world was, too.

        A thread of theirs that lets go of a tensor while the interpreter ends would abort it. If one still waits
        they are left alone: destroying them waits for it.
        """
        if self.current and not self._waits:
            threads = [
                _torch.host_threads_of(g) for g in (dist.group.WORLD, self.data, self.control)
            ]
            for group in (None,) if world else (self.data, self.control):
                dist.destroy_process_group(group)
            self.data = self.control = group = None
            del threads  # the last of them, after the groups

    def _named(self, error: RuntimeError, late: bool) -> RankLost:
        """Who does not answer, by what the survivors leave in the store; it may be gone, too."""
        missing = set(range(self.size))
        how = f"has not answered within {self.timeout:g} s" if late else "is gone"
        try:
            how = self.store.compare_set("why", "", how).decode() or how  # as the first one sees it
            self.store.set(f"survivor/{self.rank}", "")
            start = time.perf_counter()
            while missing and time.perf_counter() < start + _NAMING:
                missing = {r for r in missing if not self.store.check([f"survivor/{r}"])}
                if len(missing) == 1 and time.perf_counter() > start + _NAMING / 4:
                    break
                time.sleep(0.02)
        except RuntimeError:
            missing = {0}  # whose store it was
        who = f"rank {', '.join(map(str, sorted(missing)))} of {self.size} {how}"
        if not missing:
            who = (
                f"all {self.size} processes are there, and wait for different things: each has to make the same "
                "products in the same order, in one thread, or all call A.drive(lambda A: ...)"
            )
        return RankLost(
            f"{who}, as rank {self.rank} sees it; start the processes anew, as "
            f"torchrun --max-restarts does. torch.distributed says: {str(error).splitlines()[0]}"
        )


_CURRENT: list[Team] = []


def init(*, timeout: float = TIMEOUT) -> Team:
    """Join the processes that ``torchrun`` has started, or start as a team of one.

    Every process calls it. What torch.distributed is already initialized for is used as it is; else it
    is initialized here, with NCCL for GPUs and gloo for the host, and a store of its own for each
    attempt: a restart by ``torchrun --max-restarts`` finds none of the keys of the attempt before.
    What was made here is destroyed at the end of the program.

    Parameters
    ----------
    timeout : float
        Seconds that a process waits for the others within a product, after which all fail.

    Returns
    -------
    Team
        The same at every call.

    Raises
    ------
    RuntimeError
        If this torch was built without torch.distributed.

    Examples
    --------
    >>> from hvpop.distributed import init
    >>> team = init()
    >>> team.rank, team.size
    (0, 1)
    """
    if not dist.is_available():
        raise RuntimeError(
            "hvpop.distributed expects a torch with torch.distributed, which this build "
            f"({torch.__version__}) has not; install another build, or work on one process without it"
        )
    if _CURRENT and _CURRENT[0].current:
        return _CURRENT[0]
    _CURRENT.clear()
    ours = not dist.is_initialized()
    if ours:
        _initialize(timeout)
    store = dist.PrefixStore(f"hvpop_{_attempt()}", _torch.default_store())
    data = control = None
    if dist.get_world_size() > 1:
        data = dist.new_group(timeout=timedelta(seconds=timeout))
        control = dist.new_group(backend="gloo", timeout=_IDLE)
    team = Team(store, timeout, data, control)
    _CURRENT.append(team)
    if team.size > 1:
        atexit.register(team.leave, ours)
    return team


def _initialize(timeout: float) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    limit = timedelta(seconds=timeout)
    if size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not agent,
        timeout=limit,
    )
    attempt = dist.PrefixStore(_attempt(), store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=limit)


def _attempt() -> str:
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
