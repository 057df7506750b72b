"""Wheel and sdist as their users get them: installed by themselves, complete, and running; ``make release``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMOKE = """
import json, sys
import hvpop
heavy = sorted({"typer", "jinja2", "transformers", "lightning", "matplotlib", "sklearn"} & set(sys.modules))
assert not heavy, f"import hvpop imports {heavy}"
import torch
from hvpop import Diagonal
from hvpop.report import analyze, render
page = render(analyze(Diagonal(torch.arange(1.0, 9.0).double()), k=1))
assert page.startswith("<!doctype html>")
print(hvpop.__file__, hvpop.__version__)
"""


def tried(archive: Path) -> str:
    """Install one archive into a folder of its own, run it there, and return its version."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "installed"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", str(place), str(archive)], check=True)
        environment = {**os.environ, "PYTHONPATH": str(place)}

        def run(*command: str) -> str:
            return subprocess.run(
                [sys.executable, *command], cwd=folder, env=environment, check=True,
                capture_output=True, text=True,
            ).stdout  # fmt: skip

        file, version = run("-c", SMOKE).split()
        assert Path(file).is_relative_to(place), f"{file} is not the installed one"
        assert (place / "hvpop" / "py.typed").exists()
        assert "spectrum" in run("-m", "hvpop.cli", "--help")
        return version


def main(folder: Path) -> None:
    archives = sorted(folder.glob("hvpop-*"))
    assert len(archives) == 2, f"{folder} holds no wheel and sdist: run python -m build"
    versions = {tried(archive) for archive in archives}
    assert len(versions) == 1, versions
    print(f"{', '.join(a.name for a in archives)}: both install and run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
