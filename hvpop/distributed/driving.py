"""One process runs a solver, the others serve it: the same line on every rank."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from .errors import RankLost, RemoteError, words
from .interrupts import deferred
from .team import Team

T = TypeVar("T")

STOP, ABORT, CALL = "stop", "abort", "call"


def drive(team: Team, work: Callable[[], T]) -> T:
    """``work()``, run by rank 0, whose result or exception is that of every process."""
    if team.size == 1 or team.leading:
        return work()
    return _lead(team, work) if team.rank == 0 else _serve(team)


def _lead(team: Team, work: Callable[[], T]) -> T:
    team.leading = True
    try:
        result = work()
        said = pickle.dumps(result)  # what cannot be sent is an error while the others still listen
    except RankLost:
        raise  # who is left has noticed
    except BaseException as error:
        told = (
            error
            if isinstance(error, RemoteError)
            else RemoteError(0, f"rank 0 aborted: {words(error)}")
        )
        if team.lost is None:
            with suppress(RankLost), deferred():  # the error that is on its way counts
                team.command((ABORT, told.rank, told.message))
        raise
    else:
        with deferred():
            team.command((STOP, said))
        return result
    finally:
        team.leading = False


def _serve(team: Team) -> Any:
    """Do what rank 0 says, until it has ended.

    What fails here it is told of within the product, Ctrl-C too; whether all is over is for its solver to say.
    """
    made: list[Any] = []  # operators made for it are held as long as it works
    cause: BaseException | None = None
    interrupt: KeyboardInterrupt | None = None
    with deferred():
        while True:
            kind, *rest = team.command()
            if kind != CALL and interrupt is not None:
                raise interrupt
            if kind == STOP:
                return pickle.loads(rest[0])
            if kind == ABORT:
                raise RemoteError(*rest) from cause
            number, name, args = rest
            try:
                made.append(getattr(team.member(number), name)(*args))
                cause = None
            except RankLost:
                raise
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception as error:
                cause = error.__cause__


def together(team: Team, number: int, name: str, *args: Any) -> None:
    """Let the others call a method, too, if one process drives."""
    if team.leading:
        team.command((CALL, number, name, args))
