"""Words that representations, titles and messages share."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice


def counted(count: int, noun: str) -> str:
    """The count with its noun, in the singular for one."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names and how many more there are: a network has hundreds."""
    rest = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {rest} more" if rest > 0 else "")


def nearest(pattern: str, names: Sequence[str]) -> str:
    """What a name or glob that matches none of these may be meant for."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"did you mean {pattern}.*?"
    close = get_close_matches(pattern, names, n=1)
    return f"did you mean {close[0]}?" if close else f"it has {some(names)}"
