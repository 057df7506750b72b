"""The gallery: each example is run, and gets a page with its pictures, what it prints and its source."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LINK = re.compile(r"\]\(\.\./examples/(\w+)\.py\)")
HEAD = """\
# Gallery

Each example checks its own numbers; here is what the build of this site made of it.

"""


def make(examples: Path, folder: Path) -> None:
    """Run the examples that have changed since, and write the pages."""
    folder.mkdir(exist_ok=True)
    names = sorted(path.stem for path in examples.glob("*.py"))
    for name in names:
        _page(examples / f"{name}.py", folder)
    cards = []
    for name in names:
        title = (folder / f"{name}.md").read_text("utf-8").partition("\n")[0].removeprefix("# ")
        pictures = sorted(folder.glob(f"{name}-*.png"))
        shown = f"\n\n[![{title}]({pictures[0].name})]({name}.md)" if pictures else ""
        cards.append(f"## {name}\n\n[{title}]({name}.md){shown}\n")
    listed = "\n".join(names)
    toctree = f"```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    (folder / "index.md").write_text(HEAD + "\n".join([*cards, toctree]), "utf-8")


def _page(example: Path, folder: Path) -> None:
    source = example.read_text("utf-8")
    page, mark = folder / f"{example.stem}.md", hashlib.sha256(source.encode()).hexdigest()[:16]
    if page.exists() and f"<!-- {mark} -->" in page.read_text("utf-8"):
        return
    for old in folder.glob(f"{example.stem}-*.png"):
        old.unlink()
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "PYTHONPATH": str(example.parents[1]), "MPLBACKEND": "Agg"}
        done = subprocess.run(
            [sys.executable, str(example.resolve())], cwd=place, env=environment, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{example} failed:\n{done.stdout}{done.stderr}")
        pictures = []
        for i, picture in enumerate(sorted(Path(place).rglob("*.png"))):
            pictures.append(f"{example.stem}-{i}.png")
            shutil.copy(picture, folder / pictures[-1])
    first, _, rest = (ast.get_docstring(ast.parse(source)) or example.stem).partition("\n")
    title = first.rstrip(".")
    shown = "".join(f"![{title}]({name})\n\n" for name in pictures)
    text = (
        f"# {title}\n\n<!-- {mark} -->\n\n{rest.strip()}\n\n{shown}"
        f"## What it prints\n\n```text\n{done.stdout.strip()}\n```\n\n"
        f"## Source\n\n```{{literalinclude}} ../../examples/{example.name}\n:language: python\n```\n"
    )
    page.write_text(text, "utf-8")
