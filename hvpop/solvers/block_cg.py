"""Conjugate gradients for many right-hand sides in one Krylov space that all of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator
from ..operators.checkpoint import Checkpoint, Place, digest
from . import checks
from .progress import Bar
from .results import Callback, SolveResult, Status, Step, worst


def block_cg(
    A: LinearOperator,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_steps: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    checkpoint: Place | None = None,
) -> SolveResult:
    """Solve ``A X = B`` for a symmetric positive definite ``A``, every column searching for all.

    Each step minimizes the error of every column over the directions of all of them, so that k
    columns take fewer steps than `cg` does: the k largest eigenvalues no longer count for its
    rate. In Hessians, whose spectra have few large eigenvalues, that is a half to a quarter.

    Parameters
    ----------
    A : LinearOperator
        Symmetric, order n; linearized here.
    b : Tensor
        ``(n, k)``, or ``(n,)`` for a single system, where it is `cg`.
    x0, rtol, atol, max_steps, callback, progress, checkpoint
        As in `cg`. There is no preconditioner.

    Returns
    -------
    SolveResult
        With the statuses of `cg`. Columns share their fate: all are multiplied until the last has
        converged; a direction of negative curvature ends the run for those that have not.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        As in `cg`.

    Notes
    -----
    D. P. O'Leary (1980), in the form of A. A. Dubrulle (2001), which keeps the residuals as an
    orthonormal basis times small coefficients: dependent columns, and columns that converge before
    others, do no harm. "converged" is said of true residuals only. Memory: seven blocks ``(n, k)``;
    beside the products ``8 n k^2`` operations a step.

    Examples
    --------
    >>> import torch
    >>> from hvpop import Diagonal
    >>> from hvpop.solvers import block_cg, cg
    >>> A = Diagonal(torch.logspace(-4, 0, 300, dtype=torch.float64))
    >>> B = torch.randn(300, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> shared, alone = block_cg(A, B), cg(A, B)
    >>> shared.converged, alone.converged, shared.steps < alone.steps / 3
    (True, True, True)
    """
    checks.symmetric("block_cg", A)
    checks.limits("block_cg", rtol, atol, max_steps)
    checks.callback("block_cg", callback)
    B = checks.columns("block_cg", A, b)
    X0 = checks.start("block_cg", A, b, x0)
    A = A.linearize()
    file = None
    if checkpoint is not None:
        settings = {"b": digest(b, A.space), "x0": digest(X0, A.space)}
        file = Checkpoint(checkpoint, "block_cg", A, settings, _VECTORS)
    run = _Run(A, B, X0, rtol, atol, file)
    limit = 10 * A.shape[0] if max_steps is None else max_steps
    bar = Bar("block_cg", progress)
    ended: Status = "max steps"
    try:
        while not run.done() and run.steps < limit and ended != "interrupted":
            run.step()
            bar.update(lambda: f"residual {worst(run.error * run.size, run.target * run.size)}")
            if file is not None and file.due_after_step():
                file.save(run.pack())
            if checks.stopped("block_cg", callback, lambda: run.report(b)):
                ended = "interrupted"
    except KeyboardInterrupt:
        ended = "interrupted"
        run.recover()
    finally:
        bar.close()
    if file is not None and (ended != "interrupted" or not A.space.shared):
        file.save(run.pack())
    return run.result(b, ended)


class _Run:
    """The iterates ``X`` and the residuals ``B - A X = Q C``, all columns in units of their size."""

    def __init__(
        self,
        A: LinearOperator,
        B: Tensor,
        X0: Tensor | None,
        rtol: float,
        atol: float,
        file: Checkpoint | None,
    ) -> None:
        self.A = A
        self.size = checks.sizes(B, A.space)  # (k,)
        self.B = B / self.size
        # zero is the answer to zero, wherever it started
        self.X = (
            torch.zeros_like(B)
            if X0 is None
            else torch.where(A.space.largest(B) == 0, 0.0, X0 / self.size)
        )
        self.target = torch.maximum(rtol * checks.norms(self.B, A.space), atol / self.size)  # (k,)
        self.steps = self.products = 0
        self.scale = 0.0  # the largest |A s| / |s| seen
        self.failure: Status | None = None
        self.direction: Tensor | None = None  # (n,)
        self.true = torch.full_like(self.size, torch.inf)  # norms at the last start
        self.history: list[Tensor] = []
        self.Q: Tensor  # (n, r), orthonormal, r = min(n, k)
        self.C: Tensor  # (r, k)
        self.S: Tensor  # (n, r), search directions
        self.error: Tensor  # (k,)
        self.best: Tensor  # (n, k), where the error was `least` since the last start
        self.least: Tensor  # (k,)
        self.checked: bool  # whether the error is that of true residuals
        if file is None or not self._found(file):
            self._start(self._seen(self.B) if X0 is None else self._true_residuals())

    # -- checkpoint -------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """All that steps have made, as tensors and plain values."""
        known = {name: getattr(self, name) for name in (*_VECTORS, *_NUMBERS)}
        return known | {"history": torch.stack(self.history)}

    def _found(self, file: Checkpoint) -> bool:
        """Whether there is a file to go on from; if so, all is as it was when that was saved."""
        saved = file.load()
        if saved is None:
            return False
        try:
            for name in (*_VECTORS, *_NUMBERS):
                setattr(self, name, saved[name])
            self.history = list(saved["history"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise file.foreign() from error
        return True

    def recover(self) -> None:
        """After a step that was cut short: what belongs together is made of ``X`` anew."""
        self._start(self._true_residuals())

    # -- steps ------------------------------------------------------------------------------------

    def done(self) -> bool:
        """Whether all columns have converged truly, or nothing more can be done."""
        # below the floor rounding in the products decides what the error really is
        floor = (
            8
            * torch.finfo(self.A.torch_dtype).eps
            * self.scale
            * checks.norms(self.X, self.A.space)
        )
        claimed = bool((self.error <= torch.maximum(self.target, floor)).all())
        if self.failure is None and claimed and not self.checked:
            before = self.true
            R = self._true_residuals()
            open_ = self.error > self.target
            if bool((open_ & (self.error > before / 2)).any()):
                self.failure = "stagnated"
            elif bool(open_.any()):
                self._start(R)
        return self.failure is not None or bool((self.error <= self.target).all())

    def step(self) -> None:
        AS = self._multiply(self.S)
        self.steps += 1
        W = self.A.space.inner(self.S, AS).to(AS)
        W = (W + W.T) / 2
        L, info = torch.linalg.cholesky_ex(W)
        if int(info):
            self._give_up(W)
            self.history.append(self.error.clone())
            return
        alpha = torch.cholesky_solve(torch.eye(len(W), dtype=W.dtype, device=W.device), L)
        self.X = _plus(self.X, self.S, alpha @ self.C)
        self.Q, Z = self._basis(_plus(self.Q, AS, -alpha))
        self.C = Z @ self.C
        self.S = _plus(self.Q, self.S, Z.T)
        self.error = checks.norms(self.C)
        self.checked = False
        self.history.append(self.error.clone())
        self._keep_best()

    def _keep_best(self) -> None:
        """Go back to the best iterates, and stop, if errors have grown beyond any return.

        So they do where ``A`` is singular and has no solution: ``X`` runs away along its null space.
        """
        better = self.error <= self.least
        self.best = self.X if bool(better.all()) else torch.where(better, self.X, self.best)
        self.least = torch.where(better, self.error, self.least)
        eps = torch.finfo(self.X.dtype).eps
        if not bool((self.error <= self.least / eps**0.5).all()):
            self.X, self.failure = self.best, "stagnated"

    def report(self, b: Tensor) -> Step:
        x = (self.X * self.size).reshape(b.shape)
        return Step(self.steps, x, self.error * self.size, self.products)

    def result(self, b: Tensor, unfinished: Status) -> SolveResult:
        if not self.checked:
            self._true_residuals()
        status: list[Status] = [
            "converged" if ok else self.failure or unfinished
            for ok in (self.error <= self.target).tolist()
        ]
        directions = None
        if self.direction is not None:
            negative = torch.tensor([s == "negative curvature" for s in status])
            directions = torch.where(negative.to(b.device), self.direction[:, None], 0.0)
            directions = directions.reshape(b.shape)
        return SolveResult(
            x=(self.X * self.size).reshape(b.shape),
            status=tuple(status),
            residual_norms=self.error * self.size,
            targets=self.target * self.size,
            history=torch.stack(self.history) * self.size,
            steps=self.steps,
            products=self.products,
            directions=directions,
        )

    def _start(self, R: Tensor) -> None:
        """Begin from true residuals."""
        self.Q, self.C = self._basis(R)
        self.S = self.Q

    def _true_residuals(self) -> Tensor:
        return self._seen(self.B - self._multiply(self.X))

    def _seen(self, R: Tensor) -> Tensor:
        """Take the errors from true residuals."""
        self.error = checks.norms(R, self.A.space)
        self.true, self.checked = self.error, True
        self.best, self.least = self.X, self.error
        if not self.history:
            self.history.append(self.error.clone())
        return R

    def _basis(self, R: Tensor) -> tuple[Tensor, Tensor]:
        Q, C = self.A.space.qr(R)
        return Q, C.to(R)

    def _multiply(self, V: Tensor) -> Tensor:
        Y: Tensor = self.A @ V
        self.products += V.shape[1]
        growth = checks.norms(Y, self.A.space) / checks.norms(V, self.A.space).clamp_min(
            torch.finfo(V.dtype).tiny
        )
        if not bool(growth.isfinite().all()):
            raise FloatingPointError(
                f"block_cg({self.A!r}): a product is not finite; look for non-finite entries in the "
                "model, the data or the damping"
            )
        self.scale = max(self.scale, float(growth.max()) if growth.numel() else 0.0)
        return Y

    def _give_up(self, W: Tensor) -> None:
        """``S'AS`` is not positive definite: beyond rounding, or because it is singular."""
        curvatures, vectors = torch.linalg.eigh(W)
        direction = self.S @ vectors[:, 0]
        length = checks.norms(direction[:, None], self.A.space)[0]
        eps = torch.finfo(self.A.torch_dtype).eps
        if float(curvatures[0] / length**2) < -len(W) * eps * self.scale:
            self.failure, self.direction = "negative curvature", direction / length
        else:
            self.failure, self.X = "stagnated", self.best


def _plus(U: Tensor, V: Tensor, M: Tensor) -> Tensor:
    """``U + V M``, in the layout that spaces and products are fast in: columns side by side."""
    return torch.addmm(U.T, M.T, V.T).T


_VECTORS = ("X", "Q", "S", "best", "direction")
_NUMBERS = (
    "C", "error", "least", "true", "checked", "failure", "steps", "products", "scale",
)  # fmt: skip
