"""LSTM layers whose derivatives multiply each weight once for all steps.

The states of a layer solve a nonlinear system that is triangular in time; their derivatives, of any
order, are made of products over all steps at once and of solutions of the linearized system or its
transpose, one step after the other. torch's own double backward goes step by step through everything: it
adds up a gradient of the weights at each (two layers of 512, 32 steps: 7 gradients a product).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ... import _torch
from .convolutions import is_ordinary

Three = tuple[Tensor, Tensor, Tensor]
"""Before the gates ``(steps, batch, 4 width)``, cells and outputs ``(steps, batch, width)``."""


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Any,
    has_biases: Any = None,
    num_layers: Any = None,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """For ``torch.lstm``; None where torch's own way is taken: packed, projected, forward mode."""
    if not isinstance(params, list | tuple) or not isinstance(num_layers, int):
        return None  # packed sequences have other arguments
    if (dropout > 0 and train and num_layers > 1) or _torch.dual_depth() >= 0:
        return None
    ways, size = 2 if bidirectional else 1, 4 if has_biases else 2
    runs = num_layers * ways
    if len(params) != runs * size or not (input.dim() == 3 and is_ordinary(input, *hx, *params)):
        return None
    x = input.transpose(0, 1) if batch_first else input
    batch = x.shape[1]
    width = params[1].shape[1]
    if 0 in x.shape or any(h.shape != (runs, batch, width) for h in hx):
        return None
    last: list[tuple[Tensor, Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for way in range(ways):
            run = layer * ways + way
            into, across, *biases = params[run * size : (run + 1) * size]
            if into.shape != (4 * width, x.shape[2]) or across.shape != (4 * width, width):
                return None
            bias = biases[0] + biases[1] if biases else None
            driven = F.linear(x.flip(0) if way else x, into, bias)
            _, cells, states = solved(driven, across, hx[0][run], hx[1][run])
            last.append((states[-1], cells[-1]))
            outputs.append(states.flip(0) if way else states)
        x = outputs[0] if ways == 1 else torch.cat(outputs, 2)
    h, c = (torch.stack(list(each)) for each in zip(*last, strict=True))
    return x.transpose(0, 1) if batch_first else x, h, c


class States(Function):
    """``z_t = d_t + W h_(t-1)``, ``c_t = f c_(t-1) + i g``, ``h_t = o tanh(c_t)``, with the gates of z."""

    generate_vmap_rule = True

    @staticmethod
    def forward(driven: Tensor, across: Tensor, h: Tensor, c: Tensor) -> Three:
        zs, cs, hs = [], [], []
        for d in driven.unbind():
            z = torch.addmm(d, h, across.t())
            i, f, g, o = z.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            zs.append(z)
            cs.append(c)
            hs.append(h)
        return torch.stack(zs), torch.stack(cs), torch.stack(hs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
        _, across, h, c = inputs
        ctx.save_for_backward(across, h, c, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        across, h, c, zs, cs, hs = ctx.saved_tensors
        i, f, g, o = zs.chunk(4, 2)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        shape = cs.tanh()
        slopes = torch.cat(
            [i * (1 - i) * g, f * (1 - f) * _before(cs, c), i * (1 - g * g), o * (1 - o) * shape], 2
        )
        ends = _filled(cotangents, zs, cs)
        z, cell, _ = linear(True, *ends, across, slopes, f, o * (1 - shape * shape))
        wanted = ctx.needs_input_grad
        return (
            z,
            _outer(z, _before(hs, h)) if wanted[1] else None,
            z[0] @ across if wanted[2] else None,
            f[0] * cell[0] if wanted[3] else None,
        )


class LinearSystem(Function):
    """The linearized system for sources on the right, or its transpose.

    ``z_t = source + W h_(t-1)``, ``c_t = source + (a z)_ifg + f c_(t-1)``, ``h_t = source + q c_t + (a z)_o``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        transposed: bool,
        z: Tensor,
        c: Tensor,
        h: Tensor,
        across: Tensor,
        a: Tensor,
        f: Tensor,
        q: Tensor,
    ) -> Three:
        return (_backward if transposed else _forward)(z, c, h, across, a, f, q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
        ctx.transposed, _, _, _, *system = inputs
        ctx.save_for_backward(*system, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        across, a, f, q, *found = ctx.saved_tensors
        ends = _filled(cotangents, found[0], found[1])
        other = linear(not ctx.transposed, *ends, across, a, f, q)
        # What the system makes of a cotangent is a bilinear form; here are its two sides.
        left, right = (found, other) if ctx.transposed else (other, found)
        (zl, cl, hl), (zr, cr, hr) = left, right
        wanted = ctx.needs_input_grad[4:]
        by_slopes = None
        if wanted[1]:
            i, j, k, o = zr.chunk(4, 2)
            by_slopes = torch.cat([cl * i, cl * j, cl * k, hl * o], 2)
        zero = cr.new_zeros(()).expand(cr.shape[1:])
        return (
            None,
            *other,
            _outer(zl, _before(hr, zero)) if wanted[0] else None,
            by_slopes,
            cl * _before(cr, zero) if wanted[2] else None,
            hl * cr if wanted[3] else None,
        )


solved: Callable[..., Three] = States.apply
linear: Callable[..., Three] = LinearSystem.apply


def _forward(
    z: Tensor, c: Tensor, h: Tensor, across: Tensor, a: Tensor, f: Tensor, q: Tensor
) -> Three:
    zs: list[Tensor] = []
    cs: list[Tensor] = []
    hs: list[Tensor] = []
    for z_, c_, h_, a_, f_, q_ in zip(*(t.unbind() for t in (z, c, h, a, f, q)), strict=True):
        if zs:
            z_ = torch.addmm(z_, hs[-1], across.t())
            c_ = torch.addcmul(c_, f_, cs[-1])
        i, j, k, o = (a_ * z_).chunk(4, 1)
        c_ = c_ + i + j + k
        zs.append(z_)
        cs.append(c_)
        hs.append(torch.addcmul(h_ + o, q_, c_))
    return torch.stack(zs), torch.stack(cs), torch.stack(hs)


def _backward(
    z: Tensor, c: Tensor, h: Tensor, across: Tensor, a: Tensor, f: Tensor, q: Tensor
) -> Three:
    zs: list[Tensor] = []
    cs: list[Tensor] = []
    hs: list[Tensor] = []
    each = [t.unbind()[::-1] for t in (z, c, h, a, f, q)]
    gone: Tensor | None = None  # the f of the step after
    for z_, c_, h_, a_, f_, q_ in zip(*each, strict=True):
        if gone is not None:
            h_ = torch.addmm(h_, zs[-1], across)
            c_ = torch.addcmul(c_, gone, cs[-1])
        c_ = torch.addcmul(c_, q_, h_)
        zs.append(torch.addcmul(z_, a_, torch.cat([c_, c_, c_, h_], 1)))
        cs.append(c_)
        hs.append(h_)
        gone = f_
    return torch.stack(zs[::-1]), torch.stack(cs[::-1]), torch.stack(hs[::-1])


def _before(states: Tensor, first: Tensor) -> Tensor:
    """The state before each step."""
    return torch.cat([first[None], states[:-1]])


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Over all steps and samples at once."""
    flat, other = (t.reshape(-1, t.shape[2]) for t in (left, right))
    return flat.t() @ other


def _filled(cotangents: Sequence[Tensor | None], z: Tensor, c: Tensor) -> list[Tensor]:
    zero = c.new_zeros(())
    likes = zip(cotangents, (z, c, c), strict=True)
    return [zero.expand(like.shape) if t is None else t for t, like in likes]
