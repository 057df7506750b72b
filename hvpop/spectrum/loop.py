"""The loop that every long computation runs in: budget, progress, Ctrl-C, checkpoint."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar, get_args, get_type_hints

import torch

from .._torch import leads
from ..operators import LinearOperator
from ..operators.checkpoint import Checkpoint, Rows
from ..operators.measured import Measured
from .results import Status


class State(Protocol):
    """What a computation knows after some products: never changed, only followed by the next."""

    @property
    def products(self) -> int:
        """Products taken so far."""
        ...


S = TypeVar("S", bound=State)
T = TypeVar("T")


class Task(ABC, Generic[S]):
    """A computation cut into steps, each of which leaves a state that can be read and saved.

    A step builds the next state from the last one and writes to nothing that the last one uses, so
    that an interrupted step is as if it had not begun; or else `recovered` knows what to do.
    """

    name: str
    A: LinearOperator
    source: Measured
    """``A`` in units of its size, as states are; what leaves a task is not."""

    state_type: type[S]
    """A dataclass, and so may be what is in it."""

    vectors: tuple[str, ...] = ()
    """Names in `pack` of what has an entry, or a row of them, for each of the n."""

    @abstractmethod
    def start(self) -> S:
        """The state before the first product."""

    @abstractmethod
    def price(self, state: S) -> int:
        """How many products the smallest possible next step takes."""

    @abstractmethod
    def advance(self, state: S, left: int) -> S:
        """The next state, for at most ``left`` products."""

    @abstractmethod
    def verdict(self, state: S) -> Status | None:
        """How it ended, or None if there is more to do."""

    def recovered(self, state: S) -> S:
        """The last state that can be read after an interrupt, where a step has spent ``state``."""
        return state

    def short(self, state: S) -> Status:
        """How it ended where the budget did."""
        return "max products"

    @abstractmethod
    def report(self, state: S) -> str:
        """What a user wants to see while waiting."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What a checkpoint must agree on."""

    def pack(self, state: S) -> dict[str, Any]:
        """The state as a dictionary of tensors and plain values."""
        return {**flat(state), "unit": self.source.unit}

    def rows(self, state: S) -> Rows | None:
        """What `pack` leaves out, because it grows by rows."""
        return None

    def unpack(self, saved: Mapping[str, Any]) -> S:
        """The inverse of `pack`."""
        self.source.unit = saved["unit"]
        return built(self.state_type, saved)


def flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass by name, those of dataclasses in it by dotted ones; nothing is copied."""
    found: dict[str, Any] = {}
    for field in fields(record):
        name, value = prefix + field.name, getattr(record, field.name)
        found |= flat(value, f"{name}.") if is_dataclass(value) else {name: value}
    return found


def built(kind: type[T], saved: Mapping[str, Any], prefix: str = "") -> T:
    """The inverse of `flat`; of several dataclasses that a field may hold, that of these names."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        place = f"{prefix}{name}."
        names = {n.removeprefix(place).partition(".")[0] for n in saved if n.startswith(place)}
        kinds: list[Any] = [
            k
            for k in (hint, *get_args(hint))
            if is_dataclass(k) and {f.name for f in fields(k)} == names
        ]
        values[name] = built(kinds[0], saved, place) if kinds else saved[prefix + name]
    return kind(**values)


def run(
    task: Task[S],
    *,
    max_products: int,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
) -> tuple[S, Status]:
    """The state where ``task`` ends, and how it ended; raises what a product raises."""
    file, state = None, None
    if checkpoint is not None:
        file = Checkpoint(checkpoint, task.name, task.A, task.settings(), task.vectors)
        saved = file.load()
        try:
            state = None if saved is None else task.unpack(saved)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise file.foreign() from error
    saved_last = state
    # Of several processes some may have been interrupted, or failed, and others not: they save together or not.
    saves = not task.A.space.shared
    if state is None:
        state = task.start()
    status: Status
    bar = _bar(task.name, max_products, state.products) if progress and leads() else None
    if bar is not None and state.products:
        bar.set_postfix_str(task.report(state))  # where an earlier run has ended
    try:
        with torch.no_grad():
            while (verdict := task.verdict(state)) is None:
                left = max_products - state.products
                if left < task.price(state):
                    break
                before, state = state.products, task.advance(state, left)
                due = file is not None and file.due_after_step()
                if bar is not None:
                    bar.set_postfix_str(task.report(state), refresh=False)
                    bar.update(state.products - before)
                if file is not None and due:
                    file.save(task.pack(state), task.rows(state))
                    saved_last = state
        status = task.short(state) if verdict is None else verdict
        saves = True
    except KeyboardInterrupt:
        state = task.recovered(state)
        if state.products == 0 or not saves:
            raise  # there is nothing to return
        status = "interrupted"
    finally:
        if bar is not None:
            bar.close()
        state = task.recovered(state)
        if saves and file is not None and state.products > 0 and state is not saved_last:
            file.save(task.pack(state), task.rows(state))
    return state, status


def _bar(name: str, total: int, done: int) -> Any:
    from tqdm.auto import tqdm  # seldom needed, and slow to import

    return tqdm(desc=name, total=total, initial=done, unit=" products")
