"""Imports go down only: every module of hvpop may import the layers below its own, no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hvpop"

LAYERS = {
    5: ("cli",),
    4: ("integrations", "report"),
    3: ("distributed", "functional", "plotting", "testing"),
    2: ("curvature", "solvers", "spectrum"),
    1: ("operators", "strategies", "risk"),
    0: ("graph", "interception", "marker"),
    -1: ("exchange",),
    -2: ("_torch",),
}
LEVEL = {part: level for level, parts in LAYERS.items() for part in parts}

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path: Path) -> str:
    """The folder of the package that a file is in, or its own name: ``risk``, ``cli``."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str, package: list[str]) -> Iterator[str]:
    """Dotted names of hvpop that a source file in ``package`` imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "hvpop")


def forbidden(part: str, source: str, package: list[str]) -> list[str]:
    """The imports that go sideways or up, or through the top of the package."""
    found = []
    for name in imported(source, package):
        target = [*name.split("."), ""][1]
        if target == "__version__" or target == part:
            continue
        if target not in LEVEL or LEVEL[target] >= LEVEL[part]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_layers_below_its_own(path: Path) -> None:
    assert part_of(path) in LEVEL, "a new part of hvpop needs a layer"
    package = ["hvpop", *path.relative_to(ROOT).parent.parts]
    assert forbidden(part_of(path), path.read_text(encoding="utf-8"), package) == []


def files_imported(path: Path) -> set[Path]:
    """The files of the package that a file imports, wherever in it it does so."""
    package = ["hvpop", *path.relative_to(ROOT).parent.parts]
    found = set()
    for name in imported(path.read_text(encoding="utf-8"), package):
        parts = name.split(".")[1:]
        while parts and not (ROOT / "/".join(parts)).with_suffix(".py").exists():
            parts.pop()  # a name in a file, or a folder's __init__, which imports the whole folder
        if parts:
            found.add((ROOT / "/".join(parts)).with_suffix(".py"))
    return found - {path}


def circles(graph: dict[Path, set[Path]]) -> list[list[str]]:
    """Files that reach themselves, one path each."""
    found = []
    for start in graph:
        stack, seen = [[start]], {start}
        while stack:
            way = stack.pop()
            for nearer in graph.get(way[-1], ()):
                if nearer == start:
                    found.append([p.stem for p in [*way, start]])
                    stack.clear()
                    break
                if nearer not in seen:
                    seen.add(nearer)
                    stack.append([*way, nearer])
    return found


@pytest.mark.parametrize("part", [p for p in LEVEL if p != "operators"])
def test_no_two_files_import_each_other_lazily_neither(part: str) -> None:
    assert circles({p: files_imported(p) for p in MODULES if part_of(p) == part}) == []


def test_a_circle_is_found() -> None:
    a, b, c = map(Path, "abc")
    assert circles({a: {b}, b: {c}, c: {b}}) == [["b", "c", "b"], ["c", "b", "c"]]
    assert circles({a: {b, c}, b: {c}, c: set()}) == []


@pytest.mark.parametrize(
    ("part", "line", "allowed"),
    [
        ("curvature", "from ..risk import EmpiricalRisk", True),
        ("curvature", "from ..operators.base import Memory", True),
        ("curvature", "from .hessian import HessianOperator", True),
        ("curvature", "import torch, scipy.sparse", True),
        ("curvature", "from ..solvers import cg", False),
        ("operators", "from ..risk import EmpiricalRisk", False),
        ("risk", "from .. import strategies", False),
        ("strategies", "import hvpop.operators", False),
        ("solvers", "from hvpop.functional import hvp", False),
        ("spectrum", "def f():\n    from ..curvature import HessianOperator", False),
        ("risk", "from hvpop import HessianOperator", False),
        ("cli", "from .functional import hvp", True),
    ],
)
def test_the_rule_tells_down_from_up(part: str, line: str, allowed: bool) -> None:
    package = ["hvpop"] if part == "cli" else ["hvpop", part]
    assert (forbidden(part, line, package) == []) is allowed
