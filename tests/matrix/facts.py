"""What an environment is, and which ops need their formulas in it, as JSON."""

from __future__ import annotations

import json
import platform

import numpy as np
import scipy
import torch

from hvpop.risk.probes import PROBES, Needed
from hvpop.risk.rewrites import REWRITES
from tests.zoo.registry import CASES
from tests.zoo.table import load


def needed() -> dict[str, bool]:
    """For each op that is tried out, whether it needs its formula in reverse mode."""
    found = {}
    for op, probes in PROBES.items():
        if probes and op in REWRITES:
            formula = REWRITES[op].__wrapped__  # type: ignore[attr-defined]
            found[op.__name__] = Needed(op, formula, probes)(torch.device("cpu"))
    return found


def main() -> None:
    load()
    cases = CASES.values()
    facts = {
        "torch": torch.__version__.partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "refused": sorted(case.name for case in cases if case.refused is not None),
        "differences": sorted(c.name for c in cases if "double backward" in str(c.warns)),
        "needed": needed(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
