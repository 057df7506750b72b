"""The suite on other releases of torch, Python, NumPy and SciPy: ``make matrix``.

Each in an environment of its own under output/matrix, made if it is missing. ``MATRIX=2.6.0,2.15.0``
chooses; ``2.13.0/python3.13`` and ``2.13.0/numpy1.26.4/scipy1.13.1`` say more than a release of torch.
What became of each goes to output/matrix/NAME.json, and all of them, once they are there, into
docs/versions.md.
A wheel of torch with CUDA's libraries is several GB: ``KEEP=0`` removes an environment after its run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .table import suite, write

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "output" / "matrix"

ALL = (
    "2.6.0",
    "2.8.0",
    "2.11.0",
    "2.13.0",
    "2.14.1",
    "2.15.0",
    "2.13.0/numpy1.26.4/scipy1.13.1",
    "2.13.0/python3.13",
)


@dataclass(frozen=True)
class Environment:
    """A torch, and what else is asked for: ``2.13.0/numpy1.26.4/python3.13``."""

    text: str

    @property
    def name(self) -> str:
        return self.text.replace("/", "-")

    @property
    def home(self) -> Path:
        return OUTPUT / "environments" / self.name

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    @property
    def interpreter(self) -> str:
        return next((part for part in self._others if part.startswith("python")), sys.executable)

    @property
    def pins(self) -> list[str]:
        """``torch==2.13.0``, ``numpy==1.26.4``."""
        found = [re.fullmatch(r"([a-z]+)([\d.]+)", part) for part in self._others]
        return [
            f"torch=={self.text.partition('/')[0]}",
            *(f"{m[1]}=={m[2]}" for m in found if m is not None and m[1] != "python"),
        ]

    @property
    def _others(self) -> list[str]:
        return self.text.split("/")[1:]

    def make(self) -> None:
        if not self.python.exists():
            subprocess.run([self.interpreter, "-m", "venv", str(self.home)], check=True)
        pins = OUTPUT / f"{self.name}.txt"
        pins.write_text("\n".join(self.pins))
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "-c", str(pins)]
        subprocess.run([*pip, *self.pins], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[test,models]"], check=True)

    def run(self, arguments: list[str]) -> dict[str, Any]:
        """Run the suite; what became of it."""
        report = OUTPUT / f"{self.name}.xml"
        suite = ["-m", "pytest", "--show-capture=no", f"--junitxml={report}", *arguments]
        subprocess.run([str(self.python), *suite], cwd=ROOT, check=False)
        facts = [str(self.python), "-W", "ignore", "-m", "tests.matrix.facts"]
        told = subprocess.run(facts, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return {**json.loads(told), **outcome(report)}


def outcome(report: Path) -> dict[str, Any]:
    """What a run of pytest found, of the zoo and of the rest."""
    counts = {"zoo": [0, 0], "rest": [0, 0]}
    failed, skipped = [], []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        count = counts["zoo" if ".zoo." in name else "rest"]
        count[0] += 1
        if kinds & {"failure", "error"}:
            count[1] += 1
            failed.append(name)
        if "skipped" in kinds:
            skipped.append(str(case.find("skipped").get("message")))  # type: ignore[union-attr]
    return {**counts, "failed": failed, "skipped": sorted(set(skipped))}


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    chosen = os.environ.get("MATRIX") or ",".join(ALL)
    for text in chosen.split(","):
        environment = Environment(text.strip())
        print(f"== {environment.text}", flush=True)
        environment.make()
        found = {"asked": environment.text, **environment.run(sys.argv[1:])}
        (OUTPUT / f"{environment.name}.json").write_text(json.dumps(found, indent=1))
        if os.environ.get("KEEP") == "0":
            shutil.rmtree(environment.home)
    results = {Environment(text).name: OUTPUT / f"{Environment(text).name}.json" for text in ALL}
    known = sorted(OUTPUT.glob("*.json"))
    if all(path.exists() for path in results.values()):
        write(known)
    else:  # the page is of all of them
        print(suite([json.loads(path.read_text()) for path in known]))


if __name__ == "__main__":
    main()
