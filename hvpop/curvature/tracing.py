"""Maps that have been used much are traced: from then on, less is repeated for each product."""

from __future__ import annotations

from collections.abc import Iterable

from ..risk import EmpiricalRisk
from ..strategies import Compiled, FirstThatWorks, HVPStrategy

TRACE_AFTER = 2048
"""Products made before a trace is. It takes what it saves in about as many: on a 64-32-10 network 0.1 s
for the trace, a second for what torch loads at the first one of a process, and 0.3 ms saved a
product. A number and not a time, so that the same calls give the same bits."""


class Tracer(Compiled):
    """`Compiled` that nobody has asked for: what cannot be traced is no reason to complain."""

    def __init__(self, strategy: HVPStrategy | None = None) -> None:
        super().__init__(strategy, compiler=False)

    def complain(self, reasons: Iterable[str]) -> None:
        for reason in reasons:
            if "disagreed" in reason:  # that would be a fault of hvpop's
                super().complain([reason])
            self.fallback_reason = self.fallback_reason or reason


def may_trace(strategy: HVPStrategy, risk: EmpiricalRisk) -> bool:
    """Whether hvpop chose the strategy, and tracing shows in nothing but speed.

    A trace runs the model on tensors without values: ordinary layers leave none of them anywhere.
    """
    return isinstance(strategy, FirstThatWorks) and strategy.current.exact and risk.plain
