"""Ctrl-C between the collectives of a product would leave processes apart: it waits for their end.

Pressed again, a second later or more, it waits for nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Deferred(AbstractContextManager["Deferred"]):
    """Ctrl-C is noted, and raised at the end, but for what runs within `allowed`."""

    def __init__(self) -> None:
        self._handler: Any = None
        self._pending = False
        self._since = 0.0

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
        if not self._pending:
            self._pending, self._since = True, time.monotonic()
        elif time.monotonic() - self._since >= 1.0:  # torchrun may repeat the terminal's at once
            self._pending = False
            raise KeyboardInterrupt


class _Thread(threading.local):
    current: Deferred | None = None


_THREAD = _Thread()


@contextmanager
def deferred() -> Iterator[Deferred]:
    """A new one, or that around in this thread."""
    if _THREAD.current is not None:
        yield _THREAD.current
        return
    with Deferred() as one:
        _THREAD.current = one
        try:
            yield one
        finally:
            _THREAD.current = None
