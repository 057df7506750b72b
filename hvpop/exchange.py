"""What hvpop changes of the user's process for a while is put back, interrupts included."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from . import _torch

T = TypeVar("T")

ONE_THREAD = threading.RLock()
"""Held while anything of the user's is not as its user knows it."""


class _Ledger(threading.local):
    def __init__(self) -> None:
        self.open: list[Exchange] = []
        self.guarded = False


_LEDGER = _Ledger()


class Exchange(AbstractContextManager[None]):
    """A context that changes something, and notes how it is put back before it does.

    A subclass overrides `_change`, which calls `_noted` before each of its steps. Ctrl-C can fall
    between any two instructions, so the end of a context may never begin: what is still noted then
    is put back by the `guarded` around it.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def _change(self) -> None:
        raise NotImplementedError

    def _noted(self, undo: Callable[..., object], *args: Any) -> None:
        """Note a step back; it may be taken twice, and also if the step itself was not."""
        self._notes.append((undo, args))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute as a step."""
        self._noted(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _enter(self, context: AbstractContextManager[Any]) -> None:
        """Enter another one as a step; the steps back of one not entered yet are none."""
        self._noted(context.__exit__, None, None, None)
        context.__enter__()

    def __enter__(self) -> None:
        _LEDGER.open.append(self)
        try:
            self._change()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        if self in _LEDGER.open:
            _put_back(_LEDGER.open.index(self))  # first those inside, whose ends were cut short
        else:
            self.put_back()

    def put_back(self) -> None:
        """Take every step back, the last one first; harmless where that has been done."""
        while self._notes:
            undo, args = self._notes[-1]
            undo(*args)
            self._notes.pop()


def _put_back(count: int) -> None:
    """All exchanges but the first ``count``, the last one first."""
    while len(_LEDGER.open) > count:
        _LEDGER.open[-1].put_back()
        _LEDGER.open.pop()


class Entered(Exchange):
    """A context of others as an exchange."""

    def __init__(self, context: AbstractContextManager[Any]) -> None:
        super().__init__()
        self._context = context
        self.value: Any = None

    def _change(self) -> None:
        self._noted(_leave, self._context)
        self.value = self._context.__enter__()


def _leave(context: AbstractContextManager[Any]) -> None:
    with suppress(RuntimeError, AttributeError):  # it was not entered yet
        context.__exit__(None, None, None)


_Mark = tuple[int, int, int, bool]


def _mark() -> _Mark:
    """How deep the stacks are, ours and torch's own."""
    return (
        len(_LEDGER.open),
        _torch.function_modes(),
        _torch.dispatch_modes(),
        torch.is_grad_enabled(),
    )


def guarded(work: Callable[[], T]) -> T:
    """What ``work()`` returns, with the process as it was before, whatever ends it.

    One thread at a time. An exception that a signal raises (Ctrl-C) can keep the end of any context
    from running; here it cannot, since an end that is cut short is begun again.
    """
    with ONE_THREAD:
        if _LEDGER.guarded:
            return work()
        mark = None
        try:
            mark = _mark()
            _LEDGER.guarded = True
            return work()
        except Exception:
            raise
        except BaseException as error:
            _finish_generators(error)
            raise
        finally:
            try:
                _sweep(mark)
            except BaseException:
                _sweep(mark)
                raise


def _finish_generators(interrupt: BaseException) -> None:
    """Let contexts of torch's that an interrupt left half entered put back what they have taken.

    They would do so when the traceback that holds them goes, and then after everything else.
    """
    step = interrupt.__traceback__
    while step is not None:
        with suppress(RuntimeError):  # a frame that is still running
            step.tb_frame.clear()
        step = step.tb_next


def _sweep(mark: _Mark | None) -> None:
    if mark is not None and _mark() != mark:
        count, functions, dispatch, grad = mark
        while _torch.function_modes() > functions:
            _torch.pop_function_mode()
        while _torch.dispatch_modes() > dispatch:
            _torch.pop_dispatch_mode(None)
        _put_back(count)
        torch.set_grad_enabled(grad)
    _LEDGER.guarded = False


class SavedTensors(Exchange):
    """Shows each tensor that autograd saves meanwhile to ``look``, and changes nothing.

    What autograd keeps is an alias: a graph that holds a result of its own by a hook would own
    itself, and never be freed.
    """

    def __init__(self, look: Callable[[torch.Tensor], None]) -> None:
        super().__init__()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is _torch.PROBE:
                self._on_top = True
            else:
                look(tensor)
            return tensor.detach()

        self._hooks = pack, lambda tensor: tensor
        self._on_top = False

    def _change(self) -> None:
        self._noted(self._pop)
        _torch.push_saved_tensors_hooks(*self._hooks)

    def _pop(self) -> None:
        self._on_top = False
        with torch.enable_grad():
            _torch.PROBE.square()
        if self._on_top:  # an interrupt may have come between the note and the step
            _torch.pop_saved_tensors_hooks()


class dual_level(Exchange):  # noqa: N801 (used like a function)
    """`torch.autograd.forward_ad.dual_level`, which an interrupt could leave half entered."""

    def _change(self) -> None:
        self._noted(_leave_dual_level, _torch.dual_depth())
        forward_ad.enter_dual_level()


def _leave_dual_level(before: int) -> None:
    """Torch counts levels twice, here and in its core, and an interrupt can fall between the two."""
    with suppress(RuntimeError):  # its core has left it, or had not entered it yet
        _torch.exit_dual_level(level=before + 1)
    _torch.set_dual_depth(before)


class Off(Exchange):
    """A switch of torch's, off for a while and nothing else."""

    def __init__(self, state: Callable[[], bool], switch: Callable[[bool], None]) -> None:
        super().__init__()
        self._state, self._switch = state, switch

    def _change(self) -> None:
        self._noted(self._switch, self._state())
        self._switch(False)


def without_cudnn() -> Off:
    """For recurrent layers, whose kernels there have no second derivative."""
    return Off(_torch.cudnn_enabled, _torch.set_cudnn_enabled)


def without_onednn() -> Off:
    """For recurrent layers in forward mode, which its kernels do not have; torch's own do."""
    return Off(_torch.onednn_enabled, _torch.set_onednn_enabled)


class Ungraded(Exchange):
    """Tensors without ``.grad`` for a while; afterwards they have theirs again."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = list(tensors)

    def _change(self) -> None:
        for tensor in self._tensors:
            if tensor.is_leaf:
                self._noted(setattr, tensor, "grad", tensor.grad)
                tensor.grad = None
