"""Rank 0 runs a solver, the others serve: results, and every way in which it can end."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as ssl
import torch
from torch import nn

from hvpop import HessianOperator, Identity, solvers
from hvpop.distributed import DataParallel, Team

from . import problems, worlds


def operator(team: Team, loss: Any = None) -> Any:
    data = problems.held("ragged", team.rank, team.size)
    return DataParallel(HessianOperator(problems.model(), loss or nn.CrossEntropyLoss(), data))


# -- what it is for ---------------------------------------------------------------------------------


def solved(team: Team) -> list[np.ndarray]:
    H = operator(team)
    n = H.shape[0]
    b = problems.columns(n, 1)[:, 0].numpy()
    damped = H + 0.5 * Identity.like(H)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((n, 2))
    found = [
        H.drive(lambda A: ssl.eigsh(A, k=3, v0=b, return_eigenvectors=False)),
        H.drive(lambda A: ssl.cg(damped, b, rtol=1e-12)[0]),
        H.drive(lambda A: ssl.minres(damped.linearize(), b, rtol=1e-12)[0]),
        H.drive(lambda A: np.sort(ssl.lobpcg(A.linearize(), start, tol=1e-10, maxiter=200)[0])),
        H.drive(lambda A: solvers.cg(damped, torch.from_numpy(b), rtol=1e-12).x.numpy()),
        H.drive(lambda A: A.block("0.*") @ b[:25]),
        H.drive(lambda A: np.array([A.linearize().is_current()])),
        H.drive(lambda A: A.batch_forms(b[:, None]).average().numpy()),
    ]
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_process_has_what_a_solver_on_rank_0_finds(ranks: int) -> None:
    found = worlds.all_of(solved, ranks)
    M = problems.dense("Hessian", problems.whole("ragged"), "SAMPLES")
    n = len(M)
    b = problems.columns(n, 1)[:, 0].numpy()
    values = np.linalg.eigvalsh(M)
    x = np.linalg.solve(M + 0.5 * np.eye(n), b)
    eigsh, cg, minres, lobpcg, own_cg, block, current, form = found[0]
    np.testing.assert_allclose(
        np.sort(eigsh), np.sort(values[np.argsort(-abs(values))[:3]]), rtol=1e-10
    )
    for solution in (cg, minres, own_cg):
        np.testing.assert_allclose(solution, x, rtol=0, atol=1e-9 * abs(x).max())
    np.testing.assert_allclose(lobpcg, values[-2:], rtol=1e-8)
    np.testing.assert_allclose(block, M[:25, :25] @ b[:25], rtol=1e-12, atol=1e-14)
    assert current.all()
    np.testing.assert_allclose(form, b @ M @ b, rtol=1e-12)
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


# -- the event table --------------------------------------------------------------------------------


CALLS: list[str] = []


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise LookupError("no words")


class Failing(nn.Module):
    """A loss that goes wrong on one rank, at its second product."""

    def __init__(self, how: str, rank: int, at: int) -> None:
        super().__init__()
        self.how, self.mine = how, rank == at

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        CALLS.append(self.how)  # what a module holds is put back after a product
        if self.mine and len(CALLS) > 8:
            if self.how == "raises":
                raise ZeroDivisionError("the dog ate this batch")
            if self.how == "speechless":
                raise SpeechlessError
            if self.how == "interrupted":
                signal.raise_signal(signal.SIGINT)
            if self.how == "nan":
                z = z * float("nan")
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hangs":
                time.sleep(6.0)
                os._exit(0)
        return nn.functional.cross_entropy(z, y)


def failing(team: Team, how: str, at: int, driven: bool) -> None:
    H = operator(team, Failing(how, team.rank, at))
    v = problems.columns(H.shape[0], 1)[:, 0]

    def products(A: Any) -> None:
        for _ in range(8):
            A @ v

    H.drive(products) if driven else products(H)


@pytest.mark.parametrize("driven", [True, False])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("how", "said"), [("raises", "ZeroDivisionError: the dog ate"), ("nan", "FloatingPointError")]
)
def test_what_one_rank_raises_all_raise_alike(how: str, said: str, at: int, driven: bool) -> None:
    outcomes = worlds.run(failing, 3, how, at, driven)
    for outcome in outcomes:
        assert outcome.error == "RemoteError"
        assert f"rank {at} of 3: {said}" in outcome.message
    assert len({o.message for o in outcomes}) == 1
    assert outcomes[at].cause.startswith(said[:10])


def test_an_exception_that_has_no_text_is_told_by_its_class() -> None:
    for outcome in worlds.run(failing, 2, "speechless", 1, True):
        assert outcome.error == "RemoteError"
        assert "rank 1 of 2: SpeechlessError: (its text cannot be had" in outcome.message


@pytest.mark.parametrize("driven", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_rank_that_is_killed_is_named_by_the_others(at: int, driven: bool) -> None:
    outcomes = worlds.run(failing, 4, "killed", at, driven, data_timeout=60.0)
    assert outcomes[at].killed
    for outcome in outcomes:
        if outcome.rank != at:
            assert outcome.error == "RankLost"
            assert f"rank {at} of 4 is gone" in outcome.message
            # not by the timeout of a minute
            assert outcome.seconds < 30


@pytest.mark.parametrize(("at", "driven"), [(0, True), (1, True), (1, False)])
def test_a_rank_that_hangs_is_named_at_the_timeout(at: int, driven: bool) -> None:
    outcomes = worlds.run(failing, 3, "hangs", at, driven, data_timeout=3.0)
    for outcome in outcomes:
        if outcome.rank != at:
            assert outcome.error == "RankLost"
            assert f"rank {at} of 3 has not answered within 3 s" in outcome.message


def solver_fails(team: Team, how: str) -> None:
    H = operator(team)

    def work(A: Any) -> Any:
        A @ problems.columns(H.shape[0], 1)[:, 0]
        if how == "raises":
            raise LookupError("no such preconditioner")
        if how == "interrupted":
            signal.raise_signal(signal.SIGINT)
        if how == "interrupted within":
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            for _ in range(10000):
                A @ problems.columns(H.shape[0], 1)[:, 0]
        return lambda: None  # no pickle of that

    if how == "interrupted within" and team.rank == 0:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    H.drive(work)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("raises", "LookupError", "LookupError: no such preconditioner"),
        ("interrupted", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("interrupted within", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("unsendable", "AttributeError", "pickle"),
    ],
)
def test_what_ends_the_solver_ends_the_others(how: str, error: str, said: str) -> None:
    leader, *others = worlds.run(solver_fails, 3, how)
    assert leader.error == error
    for other in others:
        assert other.error == "RemoteError"
        assert other.message.startswith("rank 0")
        assert said in other.message


def interrupted(team: Team, when: str) -> Any:
    """Ctrl-C on a process that serves, within its part of a product or while it waits; then another solver."""
    H = operator(team, Failing("interrupted" if when == "within" else "", team.rank, 1))
    v = problems.columns(H.shape[0], 1)[:, 0]
    if when == "idle" and team.rank == 1:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.3)

    def products(A: Any) -> None:
        for _ in range(8):
            A @ v
            time.sleep(0.1)

    with pytest.raises(BaseException) as ended:  # noqa: PT011
        H.drive(products)
    CALLS.clear()
    return repr(ended.value), H.drive(lambda A: float((A @ v).sum()))


@pytest.mark.parametrize("when", ["within", "idle"])
def test_an_interrupt_of_a_process_that_serves_ends_the_solver_on_all_and_the_next_one_runs(
    when: str,
) -> None:
    first, second, third = worlds.all_of(interrupted, 3, when)
    assert second[0] == "KeyboardInterrupt()"
    for said, _ in (first, third):
        assert said == "RemoteError(1, 'rank 1 of 3: KeyboardInterrupt')"
    assert first[1] == second[1] == third[1]


def apart(team: Team) -> None:
    H = operator(team)
    v = problems.columns(H.shape[0], 1)[:, 0]
    H.drive(lambda A: A @ v) if team.rank == 0 else H @ v


def test_processes_that_wait_for_different_things_are_told_so() -> None:
    for outcome in worlds.run(apart, 2, data_timeout=2.0):
        assert outcome.error == "RankLost"
        assert "all 2 processes are there, and wait for different things" in outcome.message


def patient(team: Team) -> float:
    H = operator(team)
    v = problems.columns(H.shape[0], 1)[:, 0]

    def work(A: Any) -> float:
        A @ v
        time.sleep(3.0)
        return float((A @ v).sum())

    return H.drive(work)


def test_the_leader_may_think_for_longer_than_the_timeout() -> None:
    assert len(set(worlds.all_of(patient, 2, data_timeout=1.5))) == 1


def solver_goes_on(team: Team) -> float:
    """A solver that catches what a product raises, and multiplies again."""
    H = operator(team, Failing("raises", team.rank, 1))
    v = problems.columns(H.shape[0], 1)[:, 0]

    def work(A: Any) -> float:
        failed = 0
        for _ in range(8):
            try:
                A @ v
            except RuntimeError:
                failed += 1
        return float(failed)

    return H.drive(work)


def test_a_solver_may_catch_what_a_product_raises() -> None:
    found = worlds.all_of(solver_goes_on, 2)
    assert found[0] == found[1] > 0
