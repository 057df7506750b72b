"""Which eigenvalue of a matrix is which, said alike on the page, in the terminal and in a comparison."""

from __future__ import annotations

from collections.abc import Sequence


def ranks(eigenvalues: Sequence[float], which: str) -> list[str]:
    """What each of the ascending ``eigenvalues`` is called, however many were asked for.

    Counted from the end of the spectrum that ``which`` of `hvpop.spectrum.eigsh` begins at.
    """
    count = len(eigenvalues)
    if which in ("LM", "SM"):
        order = sorted(range(count), key=lambda i: abs(eigenvalues[i]), reverse=which == "LM")
        words = "by size" if which == "LM" else "from zero"
        return [f"{order.index(i) + 1} {words}" for i in range(count)]
    below = {"LA": 0, "SA": count}.get(which, count // 2)  # of "BE" half
    return [f"{i + 1} from below" if i < below else f"{count - i}" for i in range(count)]
