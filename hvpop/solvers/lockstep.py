"""Many Krylov recurrences in lock-step: a block product per step, true residuals, columns that drop out.

A `Recurrence` is a solver's mathematics for columns that know nothing of each other. `solve` runs it:
it multiplies all running columns at once, checks by the true residual what the recurrence claims,
starts again from that residual where rounding has parted the two, and ends what no longer improves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from ..operators import LinearOperator, measured
from ..operators.checkpoint import Checkpoint, Place, digest
from ..operators.crossing import working_dtype
from ..operators.measured import Measured
from . import checks
from .progress import Bar
from .results import Callback, SolveResult, Status, Step, worst

GO, BREAKDOWN, NEGATIVE = 0, 1, 2


@dataclass
class State:
    """One recurrence per column; every tensor has the columns last."""

    X: Tensor  # (n, k), the iterates
    error: Tensor  # (k,), the norm that is to fall below the target
    halt: Tensor  # (k,), GO, BREAKDOWN (no further step exists) or NEGATIVE (curvature)

    def take(self, columns: Tensor) -> Self:
        """Some of the columns, copied unless they are all."""
        return replace(self, **{f.name: some(getattr(self, f.name), columns) for f in fields(self)})

    def put(self, columns: Tensor, other: Self) -> None:
        """Overwrite some of the columns."""
        every = columns.numel() == self.error.shape[0]
        for f in fields(self) if columns.numel() else ():
            if every:  # may be the same memory
                setattr(self, f.name, getattr(other, f.name))
            else:
                getattr(self, f.name)[..., columns] = getattr(other, f.name)


def some(M: Tensor, columns: Tensor) -> Tensor:
    """Columns of ``M``, by a mask or ascending indices, in a copy unless they are all."""
    if columns.dtype is torch.bool:
        columns = columns.nonzero().squeeze(1)
    if columns.numel() == M.shape[-1]:
        return M
    return M.T[columns].T if M.ndim == 2 else M[columns]


def reciprocal(values: Tensor) -> Tensor:
    """``1 / values``, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / torch.where(values == 0, 1.0, values))


S = TypeVar("S", bound=State)


class Recurrence(ABC, Generic[S]):
    """How one solver starts and steps; it counts its products and learns a scale of ``A``.

    It solves with ``A / unit``, by the unit that the first product shows, so that no square of a
    product over- or underflows.
    """

    who: str
    state_type: type[S]
    vectors: tuple[str, ...]
    """Which of a state's fields, as they are packed, have a row for each of the n."""

    def __init__(self, A: LinearOperator, M: LinearOperator | None = None) -> None:
        self.M = None if M is None else Measured(f"{self.who}'s preconditioner", M)
        self.A, self.space = A, A.space
        self.shared = self.space if self.space.shared else None
        self.products = 0
        self.dtype = working_dtype(A.torch_dtype)
        self.eps = torch.finfo(self.dtype).eps
        self.unit = 0.0  # not known yet
        self.ready: Tensor | None = None  # the next product
        self.scale = torch.zeros((), dtype=self.dtype, device=A.device)  # <= |A|, in units

    def dots(self, V: Tensor, W: Tensor) -> Tensor:
        """``v' w`` for each pair of columns, ``(k,)``."""
        return self.space.dots(V, W).to(self.dtype)

    def norms(self, V: Tensor) -> Tensor:
        """``|v|`` for each column, ``(k,)``."""
        return self.space.sized(len(V)).norms(V).to(self.dtype)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on, beside the operators and the columns."""
        return {}

    def pack(self, state: S) -> dict[str, Any]:
        """The state by name, and the names of what is in the same memory."""
        packed: dict[str, Any] = {}
        names: dict[int, str] = {}
        for f in fields(state):
            value = getattr(state, f.name)
            same = names.setdefault(id(value), f.name)
            packed[f.name] = value if same == f.name else same
        return packed

    def unpack(self, packed: Mapping[str, Any]) -> S:
        """The inverse of `pack`."""
        found = {n: packed[v] if isinstance(v, str) else v for n, v in packed.items()}
        return self.state_type(**found)

    @abstractmethod
    def start(self, B: Tensor, X: Tensor | None) -> S:
        """The recurrence from the iterates ``X`` (zero if None), its `error` from the true residual."""

    def extended(self, B: Tensor) -> Tensor:
        """The right-hand sides as they are solved for."""
        return B

    def error_at(self, B: Tensor, X: Tensor) -> Tensor:
        """The `error` of the iterates ``X`` by their true residual, ``(k,)``."""
        return self.start(B, X).error

    @abstractmethod
    def step(self, state: S) -> None:
        """One step for every column, in place; columns that cannot go on say so in `halt`."""

    def directions(self, state: S) -> Tensor | None:
        """Unit vectors ``(n, k)``, meaningful where `halt` is NEGATIVE."""
        return None

    def floor(self, state: S) -> Tensor:
        """``(k,)``: below about this, rounding in the products may decide what the error really is."""
        eps = torch.finfo(self.A.torch_dtype).eps  # of half precision, where the products have it
        return 8 * eps * self.scale * self.norms(state.X)

    def above_floor(self, state: S) -> bool:
        """Whether no error is below `floor`, where that can be told without a pass over ``x``."""
        return False

    def noise(self, B: Tensor) -> Tensor | None:
        """``(k,)``: a problem whose error at zero is no more than this has zero for its answer."""
        return None

    def error_unit(self) -> float:
        """What an error of one is, for a right-hand side in its own units."""
        return 1.0

    def begun_at(self, X: Tensor) -> Tensor:
        """``X`` in the units of ``A``, which its product shows; that product is the next."""
        Y: Tensor = self.A @ X
        self.unit = measured.unit(Y, X, self.shared) or 1.0
        self.ready = Y
        return X * self.unit

    def multiply(self, V: Tensor) -> Tensor:
        """``A V / unit``, counted and noted."""
        return self.noted(V, self.product(V))

    def product(self, V: Tensor) -> Tensor:
        """``A V / unit``, counted."""
        if self.ready is None:
            return self.counted(V, self.A @ V)
        Y, self.ready = self.ready, None
        return self.counted(V, Y, unit=1.0)

    def counted(self, V: Tensor, Y: Tensor, unit: float | None = None) -> Tensor:
        """A product ``Y`` of ``A``, or of its transpose, with ``V``, in units."""
        self.products += V.shape[1]
        if self.unit == 0.0:
            self.unit = measured.unit(Y, V, self.shared)
        if unit is None:
            unit = self.unit or 1.0
        return Y if unit == 1.0 else Y.div_(unit)

    def noted(self, V: Tensor, Y: Tensor) -> Tensor:
        """``Y``, the product of ``V`` in units, from which a scale of ``A`` is learned."""
        inside, outside = (self.space.sized(len(M)) for M in (V, Y))
        self.learn(inside.norms(V), outside.norms(Y))
        return Y

    def learn(self, sizes: Tensor, of_products: Tensor) -> None:
        """What the norms of vectors and of their products say of the scale of ``A``."""
        growth = of_products / sizes.clamp_min(torch.finfo(self.dtype).tiny)
        if growth.numel():
            self.scale = torch.maximum(self.scale, growth.max().to(self.dtype))

    def residual(self, B: Tensor, X: Tensor | None) -> Tensor:
        """``B - A X``, in memory of its own; no product where ``X`` is None."""
        return B.clone() if X is None else self.multiply(X).neg_().add_(B)

    def precondition(
        self, R: Tensor, first: Callable[[slice], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``M R`` and ``r'Mr``, float64, of residuals that ``first`` updates."""
        if self.M is None:
            return R, self.space.together((R, R), first=first)[0]
        if first is not None:
            first(slice(None))
        Z: Tensor = self.M @ R
        rho = self.space.dots(R, Z)
        checks.positive_form(self.who, self.A, self.M.parts[0], R, rho)
        return Z, rho


def solve(
    recurrence: Recurrence[S],
    b: Tensor,
    x0: Tensor | None,
    *,
    rtol: float,
    atol: float,
    max_steps: int | None,
    callback: Callback | None,
    progress: bool,
    checkpoint: Place | None,
) -> SolveResult:
    """Run the recurrence for the columns of ``b`` until each one ends; what users give is looked at first."""
    A, who = recurrence.A, recurrence.who
    checks.limits(who, rtol, atol, max_steps)
    B = recurrence.extended(checks.columns(who, A, b))
    X0 = checks.start(who, A, b, x0)
    checks.callback(who, callback)
    recurrence.A = A.linearize()
    limit = 10 * min(A.shape) if max_steps is None else max_steps
    file = None if checkpoint is None else _file(checkpoint, recurrence, b, X0)
    run = _Run(recurrence, B, X0, vector=b.ndim == 1)
    bar = Bar(who, progress)
    ended: Status = "max steps"
    try:
        if file is None or not run.found(file):
            run.begin()
        run.aim(rtol, atol)
        while run.running and run.steps < limit and ended != "interrupted":
            run.step()
            bar.update(run.worst)
            if file is not None and file.due_after_step():
                file.save(run.pack())
            if checks.stopped(who, callback, run.report):
                ended = "interrupted"
        if file is not None:
            file.save(run.pack())
        run.close_all(ended)
    except KeyboardInterrupt:
        if not run.begun:
            raise
        run.close_all("interrupted")
        if file is not None and not recurrence.space.shared:  # others may not have been interrupted
            file.save(run.pack())
    finally:
        bar.close()
    return run.result()


def _file(path: Place, recurrence: Recurrence[S], b: Tensor, X0: Tensor | None) -> Checkpoint:
    A, M = recurrence.A, recurrence.M
    settings = recurrence.settings() | {"b": digest(b, A.space), "x0": digest(X0, A.space)}
    vectors = ["x", "direction", *(f"state.{name}" for name in recurrence.vectors)]
    return Checkpoint(path, recurrence.who, A, settings, vectors, () if M is None else M.parts)


class _Run(Generic[S]):
    """The bookkeeping: where the running columns belong, and what is known of all of them."""

    def __init__(
        self, recurrence: Recurrence[S], B: Tensor, X0: Tensor | None, *, vector: bool
    ) -> None:
        k = B.shape[1]
        B = B.T.contiguous().T  # columns, each in one piece
        self.recurrence, self.vector = recurrence, vector
        # solved in units of its own entries, so that no norm over- or underflows
        self.size = checks.sizes(B, recurrence.space.sized(len(B)))  # (k,)
        self.B = B if bool((self.size == 1).all()) else B / self.size
        # zero is the answer to zero: no start away from it has a residual to be compared with
        self.X0 = None if X0 is None else torch.where(self._zeros(B), 0.0, X0 / self.size)
        self.shape = (self.recurrence.A.held[1], k)
        self._x: Tensor | None = None
        self.begun = False
        self.steps = 0
        self.columns = torch.arange(k, device=B.device)  # (running,)
        self.status: list[Status] = ["max steps"] * k
        self.reference = B.new_full((k,), torch.inf)  # least true error at a check
        self.checked = B.new_full((k,), torch.inf)  # error / floor at the last check
        self.direction: Tensor | None = None

    def _zeros(self, B: Tensor) -> Tensor:
        return self.recurrence.space.sized(len(B)).largest(B) == 0

    @property
    def x(self) -> Tensor:
        """The best iterates known, ``(n, k)``; made when first looked at, as most runs do at the end."""
        if self._x is None:
            self._x = torch.zeros(*self.shape[::-1], dtype=self.B.dtype, device=self.B.device).T
            if self.X0 is not None:
                self._x.copy_(self.X0)
        return self._x

    def _write(self, columns: Tensor, X: Tensor, last: bool = False) -> None:
        """The best iterates of some columns; ``last`` says that none of all is changed any more."""
        if columns.numel() == self.shape[1]:
            self._x = X if last else self.x.copy_(X)
        elif columns.numel():
            self.x[:, columns] = X

    @property
    def x_size(self) -> Tensor:
        """What the iterates are in units of, ``(k,)``."""
        return self.size / (self.recurrence.unit or 1.0)

    @property
    def error_size(self) -> Tensor:
        """What the errors are in units of, ``(k,)``."""
        return self.size * self.recurrence.error_unit()

    @property
    def running(self) -> bool:
        return self.columns.numel() > 0

    def begin(self) -> None:
        if self.X0 is not None:
            self.X0 = self.recurrence.begun_at(self.X0)
        X0 = None if self.X0 is None else self.X0.clone()
        self.state = state = self.recurrence.start(self.B, X0)
        zero = state if self.X0 is None else self.recurrence.start(self.B, None)
        self.error_of_zero = zero.error.clone()
        self.error = state.error.clone()
        self.history = [state.error.clone()]
        self._require_finite()

    def aim(self, rtol: float, atol: float) -> None:
        """Know what is to be reached; what has been reached before ends here, and no less goes on."""
        self.target = rtol * self.error_of_zero
        if atol:  # in units that may underflow, where nothing is asked in them
            self.target = torch.maximum(self.target, atol / self.error_size)
        if self.begun:
            self._reopen()
        elif self.running:
            self._close(self.state.error <= self.target[self.columns], "converged")
        self.begun = True
        self._close_zeros()

    # -- checkpoint -------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """All that `begin` and steps have made, as tensors and plain values."""
        r, unit = self.recurrence, None if self.recurrence.M is None else self.recurrence.M.unit
        state = r.pack(self.state) if self.running else {}
        known = {name: getattr(self, name) for name in _KNOWN}
        known |= {"x": self._x, "history": torch.stack(self.history), "state": list(state)}
        known |= {"unit": r.unit, "scale": r.scale, "products": r.products, "unit of M": unit}
        return known | {f"state.{name}": value for name, value in state.items()}

    def found(self, file: Checkpoint) -> bool:
        """Whether there is a file to go on from; if so, all is as it was when that was saved."""
        saved = file.load()
        if saved is None:
            return False
        r = self.recurrence
        try:
            for name in _KNOWN:
                setattr(self, name, saved[name])
            self._x, self.history = saved["x"], list(saved["history"])
            r.unit, r.scale, r.products = saved["unit"], saved["scale"], saved["products"]
            if r.M is not None:
                r.M.unit = saved["unit of M"]
            if self.running:
                self.state = r.unpack({name: saved[f"state.{name}"] for name in saved["state"]})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise file.foreign() from error
        if self.X0 is not None:
            self.X0 = self.X0 * r.unit
        self.begun = True
        return True

    def _reopen(self) -> None:
        """Columns that were given up for a looser tolerance or a smaller budget start from where they are."""
        noise = self.recurrence.noise(self.B)
        if noise is not None:
            zero = self.error_of_zero <= noise
            self.target = torch.where(zero, torch.maximum(self.target, noise), self.target)
        ended = torch.tensor([s in ("converged", "max steps", "interrupted") for s in self.status])
        again = ended.to(self.error.device) & (self.error > self.target)
        again[self.columns] = False
        if not bool(again.any()):
            return
        if self.running:
            self._write(self.columns, self.state.X)
        again[self.columns] = True
        self.columns = at = again.nonzero().squeeze(1)
        self.state = self.recurrence.start(some(self.B, at), some(self.x, at).clone())
        self.error[at] = self.state.error
        self.reference[at] = self.checked[at] = torch.inf
        for column in at.tolist():
            self.status[column] = "max steps"
        self._close(self.state.error <= self.target[at], "converged")

    # -- steps ------------------------------------------------------------------------------------

    def step(self) -> None:
        self.recurrence.step(self.state)
        self.steps += 1
        row = torch.full_like(self.error, torch.nan)
        row[self.columns] = self.state.error
        self.history.append(row)
        self._require_finite()
        self._close_zeros()
        self._settle()

    def _settle(self) -> None:
        """Check the columns that claim to be done, that are at the floor or that cannot go on."""
        state, at = self.state, self.columns
        negative = state.halt == NEGATIVE
        claimed = (state.error <= self.target[at]) | (state.halt == BREAKDOWN)
        low = torch.zeros_like(claimed)
        if bool(claimed.any()) or not self.recurrence.above_floor(state):
            # falls with the error, or as x grows
            depth = state.error / self.recurrence.floor(state)
            low = (depth <= 1) & (depth <= 0.1 * self.checked[at])
        due = ((claimed | low) & ~negative).nonzero().squeeze(1)
        ended = torch.zeros_like(negative)
        if due.numel():
            ended[due] = self._check(due, claimed[due], depth[due])
        if bool(negative.any()):
            self._keep_directions(negative)
            self._close_checked(negative)
        self._drop(ended | negative)

    def _check(self, due: Tensor, claimed: Tensor, depth: Tensor) -> Tensor:
        """Which of the columns ``due`` end here; the others go on, from their true residual if need be."""
        state, at = self.state, self.columns[due]
        fresh = self.recurrence.start(some(self.B, at), some(state.X, due))
        converged = fresh.error <= self.target[at]
        faithful = ~claimed & (state.error[due] >= 0.5 * fresh.error)
        improved = fresh.error <= 0.5 * self.reference[at]
        first = self.reference[at].isinf() & (fresh.error <= self.error[at])
        # not by rounding's grace
        better = converged | first | (fresh.error <= 0.9 * self.error[at])
        ended = converged | ~(faithful | improved)
        self._write(at[better], some(fresh.X, better), last=bool(ended.all()))
        self.error[at[better]] = fresh.error[better]
        self.reference[at] = torch.minimum(self.reference[at], fresh.error)
        again = improved & ~converged & ~faithful
        self.checked[at] = torch.where(again, torch.inf, depth)
        state.put(due[again], fresh.take(again))
        for column, good in zip(at[ended].tolist(), converged[ended].tolist(), strict=True):
            self.status[column] = "converged" if good else "stagnated"
        return ended

    def _keep_directions(self, negative: Tensor) -> None:
        directions = self.recurrence.directions(self.state)
        if directions is None:
            return
        if self.direction is None:
            self.direction = torch.zeros_like(self.B)
        self.direction[:, self.columns[negative]] = directions[:, negative]

    def _close_checked(self, mask: Tensor) -> None:
        """Columns that end by negative curvature where they are."""
        at = self.columns[mask]
        X = some(self.state.X, mask)
        self._write(at, X)
        self.error[at] = self.recurrence.error_at(some(self.B, at), X)
        for column in at.tolist():
            self.status[column] = "negative curvature"

    def _close_zeros(self) -> None:
        """Columns whose answer is zero, wherever they started; the noise becomes their target."""
        noise = self.recurrence.noise(self.B)
        if noise is None:
            return
        at = self.columns
        zero = (self.error_of_zero <= noise)[at]
        where = at[zero]
        if where.numel():
            self.x[:, where] = 0.0
        self.error[where] = self.error_of_zero[where]
        self.target[where] = torch.maximum(self.target[where], noise[where])
        self._close(zero, "converged")

    def _close(self, mask: Tensor, status: Status) -> None:
        for column in self.columns[mask].tolist():
            self.status[column] = status
        self._drop(mask)

    def _drop(self, mask: Tensor) -> None:
        if bool(mask.any()):
            keep = (~mask).nonzero().squeeze(1)
            self.columns, self.state = self.columns[keep], self.state.take(keep)

    def close_all(self, status: Status) -> None:
        if not self.running:
            return
        at, X = self.columns, self.state.X
        if self.steps:
            error = self.recurrence.error_at(some(self.B, at), X)
            # the last iterate, unless rounding has since spoilt one that was checked
            last = self.reference[at].isinf() | (error <= self.error[at])
            self._write(at[last], some(X, last), last=True)
            self.error[at[last]] = error[last]
        for column, good in zip(at.tolist(), (self.error <= self.target)[at].tolist(), strict=True):
            self.status[column] = "converged" if good else status
        self._drop(torch.ones_like(at, dtype=torch.bool))

    def _require_finite(self) -> None:
        if not bool(self.state.error.isfinite().all()):
            raise FloatingPointError(
                f"{self.recurrence.who}({self.recurrence.A!r}): the residual is not finite after "
                f"{self.steps} steps; look for non-finite entries in the model, the data or the damping"
            )

    def worst(self) -> str:
        text = f"residual {worst(self._norms() * self.error_size, self.target * self.error_size)}"
        return text if self.vector else f"{text}, {self.columns.numel()} columns"

    def _norms(self) -> Tensor:
        norms = self.error.clone()
        norms[self.columns] = self.state.error
        return norms

    def report(self) -> Step:
        x = self.x.clone()
        x[:, self.columns] = self.state.X
        norms = self._norms() * self.error_size
        return Step(self.steps, self._as_b(x * self.x_size), norms, self.recurrence.products)

    def result(self) -> SolveResult:
        return SolveResult(
            x=self._as_b(self.x.mul_(self.x_size)),  # not used any more
            status=tuple(self.status),
            residual_norms=self.error * self.error_size,
            targets=self.target * self.error_size,
            history=torch.stack(self.history) * self.error_size,
            steps=self.steps,
            products=self.recurrence.products,
            directions=None if self.direction is None else self._as_b(self.direction),
        )

    def _as_b(self, X: Tensor) -> Tensor:
        return X.squeeze(1) if self.vector else X


_KNOWN = (
    "columns", "status", "error", "error_of_zero", "reference", "checked", "direction", "steps",
)  # fmt: skip
