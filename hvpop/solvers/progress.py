"""A progress bar for a loop whose end nobody knows: it shows the step and what matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._torch import leads


class Bar:
    """A tqdm bar, or nothing."""

    def __init__(self, who: str, shown: bool) -> None:
        self._bar: Any = None
        if shown and leads():
            from tqdm import tqdm

            self._bar = tqdm(desc=who, unit="step")

    def update(self, text: Callable[[], str]) -> None:
        """One more step; the text is made only if it is shown."""
        if self._bar is not None:
            self._bar.set_postfix_str(text(), refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
