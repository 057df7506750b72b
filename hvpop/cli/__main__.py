"""``python -m hvpop.cli``."""

from . import main

main()
