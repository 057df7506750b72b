"""How a second derivative that turns with its direction is made of two first ones."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Place(Generic[T]):
    """Where the derivative of a gradient leaves the vectors it has chosen for its direction.

    In double backward the direction arrives at the gradient, and later what the function makes of
    it arrives at the op itself: both have to take the same vectors. A place serves one call.
    """

    def __init__(self) -> None:
        self.left: T | None = None

    def taken(self) -> T | None:
        left, self.left = self.left, None
        return left
