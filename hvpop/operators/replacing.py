"""Files that are whole or not there: written under another name, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")

_open: set[str] = set()  # the names of files that are being written ...
_naming = threading.Lock()  # ... complete where this is held


class Folder:
    """A folder that files are replaced in, by temporary ones that are private, and known by ``name``."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        own = hashlib.blake2b(f"{socket.gethostname()} {name}".encode(), digest_size=6)
        self._prefix = f".hvpop-{own.hexdigest()}-"

    def replace(self, target: Path, fill: Callable[[BinaryIO], T]) -> T:
        """Give ``target`` the content that ``fill`` writes; returns what that returns."""
        self.remove_stale()
        prefix = f"{self._prefix}{os.getpid()}-"
        with _naming:
            descriptor, name = tempfile.mkstemp(suffix=".tmp", prefix=prefix, dir=self.folder)
            temporary = Path(name)
            _open.add(temporary.name)
        try:
            with open(descriptor, "wb") as file:
                result = fill(file)
                flush(file)
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            _open.discard(temporary.name)
        _sync_folder(self.folder)
        return result

    def remove_stale(self) -> None:
        """Remove what processes of this host have left that were killed while they wrote here."""
        if os.name != "posix":
            return  # to ask for a process is to end it
        with _naming, contextlib.suppress(OSError):
            for entry in self.folder.glob(f"{self._prefix}*.tmp"):
                process = entry.name.removeprefix(self._prefix).split("-")[0]
                if process.isdigit() and entry.name not in _open and not _alive(int(process)):
                    entry.unlink(missing_ok=True)


def flush(file: BinaryIO) -> None:
    """To the disk."""
    file.flush()
    os.fsync(file.fileno())


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # not one of those being written
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # the new name itself must reach the disk
        with contextlib.suppress(OSError):  # not every file system can
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
