"""Ctrl-C between the collectives of a product would leave processes apart: it waits for their end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Deferred(AbstractContextManager["Deferred"]):
    """Ctrl-C is noted, and raised at the end, but for what runs within `allowed`."""

    def __init__(self) -> None:
        self._handler: Any = None
        self._pending = False

    def __enter__(self) -> Deferred:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._pending and exception[0] is None:
                raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """For work of this process alone."""
        if self._handler is None:
            yield
            return
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, self._handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, *args: object) -> None:
        self._pending = True


_CURRENT: list[Deferred] = []


@contextmanager
def deferred() -> Iterator[Deferred]:
    """A new one, or that around."""
    if _CURRENT:
        yield _CURRENT[-1]
        return
    with Deferred() as one:
        _CURRENT.append(one)
        try:
            yield one
        finally:
            _CURRENT.pop()
