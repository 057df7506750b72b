"""A matrix over data that several processes hold a shard of each: the only place with collectives."""

from __future__ import annotations

import builtins
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from ..curvature.average import DataAverage
from ..curvature.blocks import between
from ..curvature.findings import CheckResult, Finding
from ..curvature.fisher import FisherOperator, Sums
from ..curvature.linearized import Linearized
from ..curvature.memory import FREE_FRACTION, free_memory
from ..curvature.space import from_point
from ..curvature.stacked import Stacked
from ..exchange import guarded
from ..operators import BatchForms, Layout, LinearOperator
from ..operators.base import Memory
from ..operators.crossing import working_dtype
from ..risk.batches import NoDataError
from ..risk.fingerprint import sums
from ..risk.modules import Selection
from .driving import drive, together
from .errors import RemoteError, words
from .header import Header, hashed
from .interrupts import Deferred, deferred
from .team import Team, Traffic, init

T = TypeVar("T")


class DataParallel(LinearOperator):
    """A matrix that averages over data, of which each process has its own shard.

    Every process makes the same operator over its own part of the data, by any sampler, wraps it, and
    multiplies the same vectors: the product is that of all the data, on all processes with the same
    bits. Shards may differ in size and number of batches, or be empty.

    Parameters
    ----------
    A : HessianOperator, GaussNewtonOperator or another average over data
        Live; `linearize` comes after.
    team : Team, optional
        That of `init` by default.

    Raises
    ------
    TypeError
        If ``A`` is no average over data. Sums and damping come after: ``DataParallel(H) + c * I``.
    ValueError
        If the processes do not have the same model, kind of matrix, average, mode, strategy and seed;
        says what differs, and where.
    RemoteError
        From a product, on all processes alike, if it fails on one of them.
    RankLost
        From a product, if a process is gone or does not answer.

    Notes
    -----
    A product takes two collectives, however many columns and batches: one of a few numbers, by which
    all notice what went wrong on any of them, and the sum of ``n k`` numbers.

    Examples
    --------
    >>> import torch
    >>> from hvpop import HessianOperator
    >>> from hvpop.distributed import DataParallel, init
    >>> team = init()  # of one, without torchrun
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> shard = [(torch.eye(2), torch.zeros(2, 1))][team.rank :: team.size]
    >>> H = DataParallel(HessianOperator(model, torch.nn.MSELoss(), shard))
    >>> H @ torch.tensor([1.0, 2.0])
    tensor([1., 2.])
    """

    _fresh = True

    def __init__(self, A: DataAverage, team: Team | None = None) -> None:
        if isinstance(A, Stacked):
            raise TypeError(
                f"DataParallel expects an average over data, got {A!r}, whose rows belong to the data of each "
                "process: multiply by its own rows there, A @ v, add up what their transposes give, "
                "torch.distributed.all_reduce(A.T @ u), or take the average that they make, "
                "DataParallel(EmpiricalFisherOperator(...)) for gradients, GaussNewtonOperator for Jacobians"
            )
        if not isinstance(A, DataAverage) or isinstance(A, Linearized):
            raise TypeError(
                "DataParallel expects a live average over data (HessianOperator, "
                f"GaussNewtonOperator, ...), got {A!r}; wrap that first, and linearize, damp or add to "
                "what comes of it: DataParallel(H).linearize() + 0.1 * Identity.like(H)"
            )
        team = init() if team is None else team
        self._begin(A.on_shard(team.rank, team.size), team)
        self._agree()

    def _begin(self, A: DataAverage, team: Team) -> None:
        super().__init__(A.shape, dtype=A.torch_dtype, device=A.device, symmetric=True)
        self.team, self.source = team, A
        self.traffic = Traffic()
        self._waits = [0.0] * team.size
        self._heard: set[str] = set()  # warnings that were given
        self._looked = False  # whether the first batches were compared
        self._number = team.joined(self)

    # -- agreement --------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Refuse what is not the same on all processes, by name."""
        A = self.source
        risk = A.risk
        self._agreed(lambda: _refuse_collectives(risk.model))
        described: dict[str, Any] = {
            "the matrix": A._label(),
            "the parameters' names and shapes": str(A.layout),
            "average": repr(risk.average),
            "mode": risk.mode,
            "strategy": repr(A.strategy),
            "seed": risk.seed,
        }
        for name, t in risk.parameters().items():
            described[f"parameter {name}"] = sums(t)
        for name, t in risk.state().items():
            described[f"buffer or frozen parameter {name}"] = sums(t)
        said = self.team.everyone(described)
        for rank, other in enumerate(said):
            for what in {**said[0], **other}:
                if said[0].get(what) != other.get(what):
                    raise ValueError(_differs(what, rank, said[0].get(what), other.get(what)))

    # -- products ---------------------------------------------------------------------------------

    def drive(self, fn: Callable[[Self], T]) -> T:
        """What ``fn(self)`` returns or raises, on every process; rank 0 runs it, the others serve.

        For solvers whose decisions must not differ by a rounding, all of SciPy's among them. Every
        process calls it in the same place. Within ``fn`` this operator, what is made of it, and other
        operators of the team may be multiplied, linearized and divided into blocks, on rank 0.

        Parameters
        ----------
        fn : callable
            ``fn(A)``; what it returns is sent to all by pickle.

        Raises
        ------
        RemoteError
            If any process fails: with its rank and its words, on all of them. What ``fn`` itself raises
            is raised on rank 0 as it is, and elsewhere as ``rank 0 aborted: ...``.
        RankLost
            If a process is gone, or does not answer within the team's timeout.

        Notes
        -----
        A product costs the words of a command, a broadcast and a sum of ``n k`` numbers: the bytes of
        the all-reduce that it takes otherwise. Rank 0 may think between products for any time.

        Examples
        --------
        >>> import torch
        >>> from scipy.sparse.linalg import eigsh
        >>> from hvpop import HessianOperator
        >>> from hvpop.distributed import DataParallel
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> data = [(torch.eye(3).double(), torch.zeros(3, 1).double())]
        >>> H = DataParallel(HessianOperator(model, torch.nn.MSELoss(), data))
        >>> H.drive(lambda A: eigsh(A, k=1, return_eigenvectors=False)).round(6)
        array([0.666667])
        """
        return drive(self.team, lambda: fn(self))

    def _apply(self, V: Tensor) -> Tensor:
        if self.team.size == 1:
            return self.source._apply(V)
        if not self.team.leading:
            return guarded(lambda: self._product(V))
        with deferred():
            self._together("_served", V.shape[1])
            return guarded(lambda: self._driven(V))

    def _served(self, k: int) -> None:
        """A product for rank 0, which has the vectors."""
        dtype = working_dtype(self.torch_dtype)
        self._driven(torch.empty(k, self.shape[1], dtype=dtype, device=self.device).T)

    def _driven(self, V: Tensor) -> Tensor:
        V = self.team.share(V.T.contiguous(), 0).T
        return guarded(lambda: self._product(V, at=0))

    def _together(self, name: str, *args: Any) -> None:
        together(self.team, self._number, name, *args)

    def _product(self, V: Tensor, at: int | None = None) -> Tensor:
        """The product with columns that all processes have, at one of them or on all."""
        before = replace(self.team.traffic)
        scale = self.source.scale(V)
        own = V if scale is None else V / scale
        with deferred() as interrupts:
            try:
                Y = self._summed(own, interrupts, at)
            finally:
                self.traffic.add(self.team.traffic, before)
                self.team.steps += 1
        return Y if scale is None else Y * scale

    def _summed(self, V: Tensor, interrupts: Deferred, at: int | None) -> Tensor:
        A, team = self.source, self.team
        said: list[tuple[str, str]] = []  # also what was said before a strategy failed
        while True:
            local = self._locally(V, interrupts)
            local.said = said = said + local.said
            header = self._told(V, local, driven=at is not None)
            self._examine(header, local)
            if header.alike("left"):
                break
            left = team.smallest(torch.tensor([A.strategies_left()], device=self.device))
            A.strategies_left(int(left))  # what failed on one process serves on none
        Y = local.Y  # the other way round in one piece of memory
        if (share := local.factor / (header["weight"] if A.risk.average.normalized else 1)) != 1:
            Y *= share
        team.add_up(Y.T) if at is None else team.add_up_at(Y.T, at)
        if header["said"]:
            self._warn(local.said)
        if at in (None, team.rank) and not bool(Y.sum().isfinite()) and not Y.isfinite().all():
            raise FloatingPointError(f"{self!r}: the sum over the processes overflows")
        return Y

    def _locally(self, V: Tensor, interrupts: Deferred) -> _Local:
        """What this process has to add; whatever fails is told to the others."""
        A = self.source
        local = _Local(V)
        try:
            with interrupts.allowed(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    total = A.summed(V)
                except NoDataError:
                    pass  # others have some
                else:
                    tensors, local.factor = total.undivided()
                    local.Y = A.examined(from_point(tensors, V), V)
                    local.weight, local.data = total.weight, True
                if not self._looked:
                    local.first = A.risk.first_batch()
            if not local.data:
                local.Y = torch.zeros_like(V.T, memory_format=torch.contiguous_format).T
        except BaseException as error:
            local.error = error
            self.team.say("error", words(error))
        else:
            said = {(w.category, str(w.message)) for w in caught}
            local.said = sorted((c.__name__, text) for c, text in said if text not in self._heard)
        return local

    def _told(self, V: Tensor, local: _Local, driven: bool) -> Header:
        """What all processes have to say before they add up."""
        A, team = self.source, self.team
        live = local.error is None and not isinstance(A, Linearized)
        point = [*A.risk.parameters().values(), *A.risk.state().values()] if live else []
        header = Header(
            team, self.device, self._waits,
            weight=local.weight, data=local.data, said=len(local.said),
            operator=self._number, columns=V.shape[1], left=A.strategies_left(),
            vector=0 if driven else hashed([V]), point=hashed(point),
            first=hashed([local.first]) if local.first else 0, failed=local.error is not None,
        )  # fmt: skip
        self._waits[team.rank] = self.traffic.seconds + team.traffic.seconds
        return header

    def _examine(self, header: Header, local: _Local) -> None:
        """Raise, on all processes alike, where something is wrong on any."""
        if header.failed is not None:
            if isinstance(local.error, KeyboardInterrupt):
                raise local.error
            raise self.team.refuse(header.failed, local.error)
        for what, complaint in _SAME.items():
            if not header.alike(what):
                raise RemoteError(0, f"{self!r}: {complaint}")
        if not header["data"]:
            raise NoDataError(f"{self!r}: no process has a batch that counts; pass each its shard")
        if not self._looked:
            self._looked = True
            if header["data"] > 1 and header.alike("first", among=header["data"]):
                self._same_data()

    def _same_data(self) -> None:
        average, W = self.source.risk.average, self.team.size
        said = f"all {W} processes begin with the same batch, as if each read all of the data"
        todo = "give each its shard, as DistributedSampler(dataset) does"
        if not average.normalized:
            raise RemoteError(
                0, f"{said}, and a {average!r} is then {W} times what it should be; {todo}"
            )
        self.team.warn(UserWarning, f"{said}: right, at {W} times the work; {todo}")

    def _warn(self, said: list[tuple[str, str]]) -> None:
        """Warnings of any process, once, on rank 0."""
        ranks: dict[tuple[str, str], list[int]] = {}
        for rank, texts in enumerate(self.team.everyone(said)):
            for one in texts:
                ranks.setdefault(one, []).append(rank)
        for (category, text), on in ranks.items():
            self._heard.add(text)
            kind = getattr(builtins, category, UserWarning)
            where = f"rank {on[0]}" if len(on) == 1 else f"{len(on)}"
            self.team.warn(kind, f"{text} (on {where} of {self.team.size} processes)")

    # -- the rest of a matrix over data -----------------------------------------------------------

    def _batch_forms(self, V: Tensor, batches: int | None) -> BatchForms | None:
        if self.team.size == 1:
            return self.source._batch_forms(V, batches)
        share = None if batches is None else -(-batches // self.team.size)
        if self.team.leading:
            self._together("_forms_served", V.cpu().numpy(), batches)
        said = self._agreed(lambda: self._forms(V, share))
        columns = V.shape[1]
        longest = max(len(weights) for _, weights in said)
        # the i-th batch of each process in turn, as samplers deal them out
        rows = [(v[i], w[i]) for i in range(longest) for v, w in said if i < len(w)][:batches]
        if not rows:
            raise NoDataError(f"{self!r}: no process has a batch that counts; pass each its shard")
        values = torch.stack([v for v, _ in rows]).reshape(-1, columns)
        weights = torch.stack([w for _, w in rows])
        return BatchForms(values, weights, self.source.risk.average.normalized)

    def _forms_served(self, V: Any, batches: int | None) -> None:
        self._batch_forms(torch.from_numpy(V).to(self.device), batches)

    def _forms(self, V: Tensor, batches: int | None) -> tuple[Tensor, Tensor]:
        try:
            found = self.source._batch_forms(V, batches)
        except NoDataError:
            found = None
        if found is None:
            return V.new_zeros(0, V.shape[1]).cpu(), torch.zeros(0)
        return found.values, found.weights

    def _agreed(self, work: Callable[[], T]) -> list[T]:
        """What a piece of work gives on each process; an error on all if it fails on one."""
        found: Any = None
        failed: BaseException | None = None
        try:
            found = work()
        except BaseException as error:
            failed = error
        said = self.team.everyone((found, None if failed is None else words(failed)))
        for rank, (_, complaint) in enumerate(said):
            if complaint is not None:
                if isinstance(failed, KeyboardInterrupt):
                    raise failed
                raise RemoteError(rank, f"rank {rank} of {self.team.size}: {complaint}") from failed
        return [result for result, _ in said]

    def check(self, batches: int | None = 1) -> CheckResult:
        """What the operator inside finds on the first batches of each process; the same on all.

        Findings that only some processes have say on which.
        """
        if self.team.size == 1:
            return self.source.check(batches)
        self._together("check", batches)
        said = self._agreed(lambda: self._checked(batches))
        on: dict[tuple[str, ...], tuple[Finding, list[int]]] = {}
        for rank, result in enumerate(said):
            for one in () if result is None else result.findings:
                numbers = one.level == "ok"  # its words hold numbers, which may differ
                key = (one.level, one.what) if numbers else (one.level, one.what, one.detail)
                on.setdefault(key, (one, []))[1].append(rank)
        found = [result for result in said if result is not None]
        if not found:
            raise NoDataError(f"{self!r}: no process has a batch that counts; pass each its shard")
        findings = [
            one if len(ranks) == len(found) else replace(one, detail=f"{one.detail} ({_on(ranks)})")
            for one, ranks in on.values()
        ]
        return CheckResult(tuple(findings), found[0].timings)

    def _checked(self, batches: int | None) -> CheckResult | None:
        """That of this process; None without data."""
        try:
            with closing(self.source.risk.terms()) as terms:
                next(terms)
        except NoDataError:
            return None
        return self.source.check(batches)

    def sampling_error(self, v: Any) -> Any:
        """That of a `FisherOperator` with draws, for the data of all processes."""
        if not isinstance(self.source, FisherOperator):
            raise TypeError(
                f"{self!r} draws no targets; expected a live FisherOperator(..., samples=2 or more)"
            )
        source: FisherOperator = self.source
        self._together("sampling_error", v)
        return source.sampling_error_over(v, lambda work: self._agreed(lambda: _sums(work, v)))

    @property
    def layout(self) -> Layout:
        return self.source.layout

    def restricted(self, params: Selection) -> Self:
        """The same matrix of some of the parameters; on every process."""
        if self.team.leading:  # what selects may be no words that can be sent
            params = list(self.source.restricted(params).layout.names)
            self._together("restricted", params)
        return self._made(self.source.restricted(params))

    def block(self, rows: Selection, cols: Selection = None) -> LinearOperator:
        """The block of some parameters against others, as of the operator inside."""
        return between(self, rows, cols)

    def is_current(self) -> bool:
        self._together("is_current")
        return all(self.team.everyone(self.source.is_current()))

    def _uses(self, count: int | None = None) -> int:
        if count is not None:
            self._together("_uses", count)
        return self.source._uses(count)

    def _linearized(self, memory: Memory, done: dict[int, LinearOperator]) -> LinearOperator:
        if id(self) not in done:
            self._together("_linearized_too", memory)
            if memory is None:  # of what is free on a machine each of its processes takes a share
                memory = int(FREE_FRACTION * free_memory(self.device)) // self.team.per_node
            made: list[LinearOperator] = []
            self._agreed(lambda: made.append(self.source._linearized(memory, {})))
            done[id(self)] = self._made(made[0])
        return done[id(self)]

    def _linearized_too(self, memory: Memory) -> LinearOperator:
        """`linearize`, as rank 0 has done it."""
        return self.linearize(memory=memory)

    def _made(self, A: Any) -> Self:
        part = type(self).__new__(type(self))
        part._begin(A, self.team)
        part._looked = True
        return part

    def report(self) -> str:
        """What the operator inside reports on this process, and what all have sent and waited."""
        t, W = self.traffic, self.team.size
        waits = ", ".join(f"{s:.2f}" for s in self._waits)
        return (
            f"{self.source.report()}\nrank {self.team.rank} of {W}: {t.collectives} collectives, "
            f"{t.bytes} bytes; seconds waiting by rank, up to the last product: {waits}"
        )

    def _label(self) -> str:
        return f"DataParallel[{self.source._label()}, {self.team.size}]"


@dataclass
class _Local:
    """What one process has to add to a product."""

    Y: Tensor  # (n, k)
    factor: float = 1.0  # by which Y is to be multiplied
    weight: float = 0.0
    data: bool = False
    error: BaseException | None = None
    first: str | None = None
    said: list[tuple[str, str]] = field(default_factory=list)


_SAME = {
    "operator": "the processes multiply by different operators; every process has to make the same "
    "products in the same order, or one of them drives: A.drive(lambda A: ...)",
    "columns": "the processes multiply different numbers of columns; pass all the same",
    "vector": "the processes multiply different vectors, which is no linear operator; pass all the same "
    "bits (a common seed), and run SciPy's solvers by A.drive(lambda A: ...)",
    "point": "parameters or buffers are no longer the same on all processes; broadcast them from one, "
    "torch.distributed.broadcast(t, 0) for each, and look for what changed them on one alone",
}


def _sums(work: Callable[[], Sums], v: Any) -> Sums:
    """What a process adds; zeros without data."""
    try:
        return work()
    except NoDataError:
        return torch.zeros(v.shape[1] if v.ndim == 2 else 1, dtype=torch.float64), 0.0


def _on(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _refuse_collectives(model: nn.Module) -> None:
    """Refuse layers that talk to other processes themselves: shards may have unequal batches."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise ValueError(
                f"DataParallel: {name} is a SyncBatchNorm in train mode, which averages over processes "
                "within the model; call model.eval(), or use BatchNorm, whose batches stand for themselves"
            )


def _differs(what: str, rank: int, expected: Any, got: Any) -> str:
    values = "" if "param" in what or "buffer" in what else f": {expected} and {got}"
    advice = "build it alike on every process"
    if what.startswith("buffer"):
        advice = (
            "broadcast it from one process, torch.distributed.broadcast(buffer, 0): BatchNorm's statistics "
            "differ after training with DistributedDataParallel"
        )
    elif what.startswith("parameter "):
        advice = "load the same checkpoint on every process, or broadcast it from one"
    return f"DataParallel: {what} differs between rank 0 and rank {rank}{values}; {advice}"
