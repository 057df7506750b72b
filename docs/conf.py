"""How the site is built: ``make docs``, offline. Pages are Markdown, the reference comes from docstrings.

The gallery is made here and not by sphinx-gallery: the examples are plain scripts with a ``main()`` and
checks of their own, which it would have cut into cells.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import gallery  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import hvpop  # noqa: E402

project = "hvpop"
author = copyright = "The hvpop developers"
version = release = hvpop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build"]

default_role = "py:obj"
autodoc_typehints = "none"  # docstrings say what arguments are, in words
autodoc_member_order = "alphabetical"
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"hvpop {version}"
html_show_sphinx = False
html_copy_source = False


def rewritten(app: Sphinx, page: str, source: list[str]) -> None:
    """Links that lead to files of the repository lead to their pages of the site."""
    source[0] = gallery.LINK.sub(r"](gallery/\1.md)", source[0])


def escaped(
    app: Sphinx, kind: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Sizes, ``|x|``, are no substitutions."""
    lines[:] = [re.sub(r"(?<!`)\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Make the gallery before the pages are read."""
    gallery.make(HERE.parent / "examples", HERE / "gallery")
    app.connect("source-read", rewritten)
    app.connect("autodoc-process-docstring", escaped)
