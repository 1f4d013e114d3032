"""The order of the house: who may import whom, and how much may lie in one place."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for package in ("umm_zoo", "data_pipelines") for file in (ROOT / package).rglob("*.py"))

#: What lies under ``umm_zoo``, lowest first. A layer imports itself and the layers below it.
LAYERS = (
    ("errors", "conversation", "grey", "batch", "outputs"),
    ("backbones", "blocks", "objectives", "rewards", "metrics", "shapes"),
    ("experiment", "checkpoints"),
    ("method", "methods", "pretraining", "callbacks", "generation"),
    ("training", "report"),
    ("comparison", "benchmarks", "testing", "release"),
    ("fit", "evaluate", "generate", "compare", "export", "new", "play", "serve"),
)


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, modules: set[str]) -> set[str]:
    """The modules of the house that a file imports, in its functions and for its types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in names}
    return found & modules - {name_of(file)}


MODULES = {name_of(file) for file in FILES}
IMPORTS = {name_of(file): imports_of(file, MODULES) for file in FILES}


def layer_of(module: str) -> int:
    package, _, rest = module.partition(".")
    if package != "umm_zoo":
        return len(LAYERS)  # whatever makes data may import the zoo, never the reverse
    if rest.endswith("__main__"):
        return len(LAYERS) - 1  # a command
    room = rest.partition(".")[0] or "errors"  # the package itself holds its version
    return next(number for number, layer in enumerate(LAYERS) if room in layer)


def reached_from(module: str) -> set[str]:
    seen: set[str] = set()
    todo = [*IMPORTS[module]]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += IMPORTS[name]
    return seen


def test_imports_point_one_way() -> None:
    pairs = [(a, b) for a, imported in IMPORTS.items() for b in imported]
    upward = {f"{a} -> {b}" for a, b in pairs if layer_of(a) < layer_of(b)}
    assert sorted(upward) == []


def test_no_import_closes_a_circle() -> None:
    assert sorted({module for module in MODULES if module in reached_from(module)}) == []


def test_at_most_ten_modules_lie_in_a_root() -> None:
    for package in ("umm_zoo", "data_pipelines"):
        there = sorted(file.name for file in (ROOT / package).glob("*.py") if file.name != "__init__.py")
        assert len(there) <= 10, there


def test_no_file_is_longer_than_300_lines() -> None:
    long = {str(file.relative_to(ROOT)) for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > 300}
    assert sorted(long) == []
