"""Compiled: the product traced once, and what does not depend on v taken out of it."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import _torch
from .base import HVPStrategy, LinearMap, Params, ScalarFunction, aligned, grad_enabled
from .compiling.program import Program, Run, first_line
from .compiling.tracing import UntraceableError
from .referee import generic
from .reverse import ReverseOverReverse, Untested
from .rounding import agree, nudged

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_MOST_PROGRAMS = 64  # kept; functions made anew for each call would pile up otherwise

BLOCK = 8
"""Columns at a time, so that one more trace serves any number of them. With more the temporaries
leave the cache (64-32-10 network, 1024 samples: 0.19 ms a column by 8, 0.24 alone, 0.2 to 0.28 by
16); fewer than `FULL` columns are faster one by one than filled up with zeros."""

FULL = 6

SPOT_CHECK = 256
"""Each time so many linear maps have been made, and at some powers of two before, is a traced product held against the strategy's:
a trace does not see all that the function depends on. It costs as much as one map, so half a per cent."""


class Compiled(HVPStrategy):
    """Trace the product once per batch shape; repeat only what depends on v.

    A Hessian-vector product is linear in v, so most of what it computes (the whole gradient, every
    derivative of an activation, every statistic of a normalisation) is the same for all v. Double
    ``autograd.grad`` is traced into a graph of ATen operations, which is split: one part runs once
    per point and leaves residuals, the other runs per product. Before the split, arithmetic on v
    is regrouped so that its weights are worked out among themselves, in the first part.

    The first product of each traced function is compared with the wrapped strategy's on the same
    data. Where it disagrees beyond rounding, or where ``fn`` cannot be traced (it draws random
    numbers, branches on values, writes to tensors that outlive it), the wrapped strategy serves
    instead, with one warning for this object.

    Parameters
    ----------
    strategy : HVPStrategy, optional
        The strategy to fall back on and to be compared with; `ReverseOverReverse` by default. Serves
        ``differentiable=True``.
    compiler : bool
        Hand the graph to TorchInductor, too, and keep whichever runs faster. Takes seconds for small
        networks and a minute or more for deep ones, once per batch shape, and needs a C++ compiler.
        Without it a trace takes about a second, and products are repeated operation by operation.

    Attributes
    ----------
    fallback_reason : str or None
        Why something was not as fast as it could be; None if everything is.

    Notes
    -----
    ``fn`` must depend on its arguments only: Python values it reads (a module's training flag) are
    those of the time of tracing. Tensors it captures are read anew for each linear map. Traces are
    found again by ``fn`` itself: pass the same object, not a new lambda, for each batch.

    Memory: about what the graph of a kept gradient takes; `LinearMap` objects tell theirs as
    ``residual_bytes``.

    Examples
    --------
    >>> import torch
    >>> from hvpop.strategies.compiled import Compiled
    >>> f = lambda p, x: (x @ p["w"]).tanh().sum()
    >>> w = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> H = Compiled(compiler=False).linearize(f, {"w": w}, torch.eye(2, dtype=torch.float64))
    >>> H({"w": torch.ones(2, dtype=torch.float64)})["w"]  # -2 tanh(w) (1 - tanh(w)^2)
    tensor([ 0.0000, -0.6397], dtype=torch.float64)
    """

    def __init__(self, strategy: HVPStrategy | None = None, *, compiler: bool = True) -> None:
        if strategy is not None and not isinstance(strategy, HVPStrategy):
            raise TypeError(
                f"Compiled expects an hvpop.HVPStrategy to wrap, got {type(strategy).__name__}"
            )
        if not isinstance(compiler, bool):
            raise TypeError(f"Compiled expects compiler as True or False, got {compiler!r:.60}")
        self.strategy = ReverseOverReverse() if strategy is None else strategy
        self.compiler = compiler
        self.fallback_reason: str | None = None
        self._programs: OrderedDict[Hashable, Program | None] = OrderedDict()
        self._maps = 0

    def of(self, strategy: HVPStrategy) -> HVPStrategy:
        return self.strategy.of(strategy)

    @property
    def of_gradients(self) -> bool:  # type: ignore[override]
        return self.strategy.of_gradients

    @property
    def plain(self) -> HVPStrategy:
        return self.strategy.plain

    def __repr__(self) -> str:
        return f"Compiled({self.strategy!r}, compiler={self.compiler})"

    def within(self, wrap: Callable[[HVPStrategy], HVPStrategy]) -> HVPStrategy:
        wrapped = self.strategy.within(wrap)
        same = wrapped is self.strategy
        return self if same else type(self)(wrapped, compiler=self.compiler)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_programs": OrderedDict()}  # a copy traces anew

    def linearize(
        self, fn: ScalarFunction, params: Params, *args: object, differentiable: bool = False
    ) -> LinearMap:
        def wrapped(point: Params = params) -> LinearMap:
            return self.strategy.linearize(fn, point, *args, differentiable=differentiable)

        program = None if differentiable else self._program(fn, params, args)
        if program is None or (program.proven and program.run is None):
            return wrapped()
        inputs = [*params.values(), *_tensors(args)]
        try:
            with _undifferentiated():
                residuals = program.prepare(*inputs)
        except Exception as error:
            if program.proven:
                raise
            self.complain([f"the traced function failed ({first_line(error)})"])
            program.proven = True
            return wrapped()
        linear = _Map(self, program, wrapped, params, residuals, _bytes_beyond(residuals, inputs))
        self._maps += 1
        if self._is_due():
            linear.verify()
        return linear

    def complain(self, reasons: Iterable[str]) -> None:
        """Record why something falls back; warn of the first."""
        for reason in reasons:
            if self.fallback_reason is None:
                self.fallback_reason = reason
                warnings.warn(f"{self!r}: {reason}; falling back", UserWarning, stacklevel=4)

    def _is_due(self) -> bool:
        few = self._maps >= 16 and self._maps & (self._maps - 1) == 0
        return few or self._maps % SPOT_CHECK == 0

    def forget(self) -> None:
        """Trace everything anew."""
        self._programs.clear()
        warnings.warn(
            f"{self!r}: a traced product was no longer that of its function, which depends on something "
            "that no trace can see (a global variable, the state of an object): it is traced anew, and "
            "products since that changed are wrong",
            stacklevel=4,
        )

    def _program(
        self, fn: ScalarFunction, params: Params, args: tuple[object, ...]
    ) -> Program | None:
        try:
            key = (fn, *_signature((params, args)))
            if key not in self._programs:
                self._programs[key] = self._traced(fn, params, args)
        except (UntraceableError, TypeError) as error:  # TypeError: fn cannot be hashed
            self.complain([f"the product cannot be traced ({error})"])
            return None
        self._programs.move_to_end(key)
        if len(self._programs) > _MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return self._programs[key]

    def _traced(
        self, fn: ScalarFunction, params: Params, args: tuple[object, ...]
    ) -> Program | None:
        leaves, structure = tree_flatten(args)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        n = len(params)

        untested = getattr(self.strategy, "untested", None) or Untested()

        def product(*tensors: Tensor) -> list[Tensor]:
            filled = list(leaves)
            for place, tensor in zip(places, tensors[n:], strict=False):
                filled[place] = tensor
            point = dict(zip(params, tensors, strict=False))
            v = dict(zip(params, tensors[n + len(places) :], strict=True))
            linear = untested.linearize(fn, point, *tree_unflatten(filled, structure))
            return list(linear(v).values())

        inputs = [*params.values(), *_tensors(args)]
        v = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in params.values()]
        try:
            return Program(product, [t.detach() for t in inputs], v, compiler=self.compiler)
        except UntraceableError as error:
            self.complain([f"the product cannot be traced ({error})"])
        except Exception as error:  # whatever Python or torch code does that a trace cannot follow
            self.complain([f"the product cannot be traced ({first_line(error)})"])
        return None


class _Map(LinearMap):
    """The residuals of one point and batch, with the program that makes products of them."""

    looks = False  # what it falls back on enters what it needs

    def __init__(
        self,
        compiled: Compiled,
        program: Program,
        wrapped: Callable[..., LinearMap],
        params: Params,
        residuals: Sequence[Tensor],
        residual_bytes: int,
    ) -> None:
        self.residual_bytes = residual_bytes
        self._compiled, self._program, self._params = compiled, program, params
        self._wrapped, self._residuals = wrapped, residuals
        self._reference: LinearMap | None = None

    def __call__(self, v: Params) -> Params:
        if not self._program.proven:
            self._prove()
        if self._program.run is None:
            return self._strategys()(v)
        with _undifferentiated():
            return self._named(self._program.run(*self._residuals, *self._ordered(v)))

    def columns(self, V: Params) -> Params:
        if not self._program.proven:
            self._prove()
        if self._program.run is None:
            return self._strategys().columns(V)
        k = next(iter(V.values())).shape[0]
        run = self._run_for_blocks() if k >= FULL else None
        if run is None:
            return super().columns(V)
        blocks = [self._block(run, V, start) for start in range(0, k - k % BLOCK, BLOCK)]
        if rest := k % BLOCK:
            last = {name: v[-rest:] for name, v in V.items()}
            blocks.append(self._block(run, last, 0) if rest >= FULL else super().columns(last))
        return {name: torch.cat([block[name] for block in blocks]) for name in V}

    def _block(self, run: Run, V: Params, start: int) -> Params:
        """The products of `BLOCK` columns, or of fewer, filled up with zeros."""
        columns = [v[start : start + BLOCK] for v in self._ordered(V)]
        k = columns[0].shape[0]
        if k < BLOCK:
            columns = [torch.cat([v, v.new_zeros(BLOCK - k, *v.shape[1:])]) for v in columns]
        with _undifferentiated():
            return self._named([product[:k] for product in run(*self._residuals, *columns)])

    def _prove(self) -> None:
        """Compare with the strategy in a direction that has a part along every eigenvector."""
        w = generic(self._params)
        expected = list(self._strategys()(w).values())
        if not all(bool(t.isfinite().all()) for t in expected):
            return
        with _undifferentiated():
            complaints = self._program.prove(
                self._residuals, self._ordered(w), expected, lambda: self._next_to_it(w)
            )
        self._compiled.complain(complaints)
        self._reference = None

    def verify(self) -> None:
        """Give up a trace that is no longer of the function, be it that nobody could see the change."""
        run = self._program.run
        if run is None or not self._program.proven:
            return
        w = generic(self._params)
        expected = list(self._strategys()(w).values())
        with _undifferentiated():
            found = run(*self._residuals, *self._ordered(w))
        if not all(bool(t.isfinite().all()) for t in expected):
            return
        if not agree(found, expected, self._program.tolerance, lambda: self._next_to_it(w)):
            self._compiled.forget()
            self._program.run = None
        else:
            self._reference = None

    def _next_to_it(self, w: Params) -> list[Tensor]:
        return list(self._wrapped(nudged(self._params))(w).values())

    def _run_for_blocks(self) -> Run | None:
        """The program for `BLOCK` columns, compared once with that for one."""
        if not self._program.columns_proven:
            W = self._ordered(generic(self._params, BLOCK))
            with _undifferentiated():
                self._compiled.complain(self._program.prove_columns(self._residuals, W))
        return self._program.run_columns

    def _strategys(self) -> LinearMap:
        if self._reference is None:
            self._reference = self._wrapped()
        return self._reference

    def _ordered(self, v: Params) -> list[Tensor]:
        as_read = aligned if self._program.views_as_complex else Tensor.contiguous
        return [as_read(v[name]) for name in self._params]

    def _named(self, result: Sequence[Tensor]) -> Params:
        return dict(zip(self._params, result, strict=True))


def _signature(arguments: object) -> tuple[Hashable, ...]:
    """All that a trace depends on: structure, tensors' shapes and kinds, and other leaves' values."""
    leaves, structure = tree_flatten(arguments)
    return (_torch.structure(structure), *map(_kind, leaves))


def _kind(leaf: object) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided or leaf.is_nested:
            raise UntraceableError(f"a tensor is {'nested' if leaf.is_nested else leaf.layout}")
        return type(leaf), leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if leaf is None or isinstance(leaf, _CONSTANTS):
        return type(leaf), leaf
    raise UntraceableError(
        f"an argument is a {type(leaf).__name__}, neither a tensor nor a constant"
    )


def _tensors(arguments: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]


def _bytes_beyond(tensors: Sequence[Tensor], known: Sequence[Tensor]) -> int:
    """Memory behind the tensors that is not behind the known ones."""
    given = [t for t in tensors if isinstance(t, Tensor)]  # an op may leave a result undefined
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in given)}
    kept = {t.untyped_storage().data_ptr() for t in known}
    return sum(size for address, size in storages.items() if address not in kept)


@contextmanager
def _undifferentiated() -> Iterator[None]:
    """Plain tensors in and out, whatever mode the caller is in."""
    with grad_enabled(), torch.no_grad():
        yield
