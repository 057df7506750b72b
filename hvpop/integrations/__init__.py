"""Curvature in training loops: a tracker for own ones, callbacks for those of others.

`hvpop.integrations.hugging_face` and `hvpop.integrations.lightning` need the extras ``hf`` and
``lightning``, and are imported by their names only.
"""

from .tracker import Tracker

__all__ = ["Tracker"]
