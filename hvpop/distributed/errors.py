"""What fails on one process, as all of them see it."""

from __future__ import annotations


class RemoteError(RuntimeError):
    """Something failed on a process, and all of them know: the same words on each.

    Where it failed the cause is chained to it.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(rank, message)
        self.rank, self.message = rank, message

    def __str__(self) -> str:
        return self.message


class RankLost(RuntimeError):  # noqa: N818 (what it says)
    """The connection is broken: a process was killed, or has not answered in time.

    Nothing more can be asked of these processes; restart them (``torchrun --max-restarts``).
    """


def words(error: BaseException) -> str:
    """An exception as text that can be sent, whatever the user's class makes of it."""
    try:
        text = str(error).encode(errors="replace").decode()
    except Exception as other:
        text = f"(its text cannot be had: {type(other).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
