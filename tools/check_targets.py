"""Every ``_target_`` of the experiment files exists: read from the source text, importing nothing.

    python tools/check_targets.py [FOLDER …]

Without arguments it looks through experiments/. A target in this repository must be a class of that module, or a classmethod of it
(imports from one module into another are followed); of other packages only the name of the package is compared with setup.cfg. It
takes a second where ``fit --check`` on every file takes minutes, and works without the libraries.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
#: Installed names that differ from the name of the distribution, and what the standard packages bring along.
PACKAGES = {"PIL", "torch", "lightning"}


def targets(tree: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(dotted place, target) of every node."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            place = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                yield place, value
            else:
                yield from targets(value, place)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from targets(value, f"{where}[{index}]")


def problem_of(target: Any) -> str | None:
    """What is wrong with a target, None if nothing is."""
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        return "is no dotted path"
    package = target.split(".")[0]
    if (ROOT / package).is_dir() and (ROOT / package / "__init__.py").is_file():
        return _problem_here(target.split("."))
    return None if package in _dependencies() else f"is of '{package}', which setup.cfg does not require"


def _dependencies() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["install_requires"].split() + " ".join(config["options.extras_require"].values()).split()
    return PACKAGES | {match[0] for item in listed if (match := re.match(r"[A-Za-z0-9_]+", item))}


def _problem_here(parts: list[str], depth: int = 0) -> str | None:
    file, rest = _module(parts)
    if file is None or not rest:
        return f"has no module {'.'.join(parts[:-1])}" if file is None else "is a module, not a class"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for statement in body:
        if isinstance(statement, ast.ClassDef) and statement.name == rest[0]:
            return _problem_in_class(statement, rest[1:])
        if isinstance(statement, ast.ImportFrom) and depth < 5:
            for alias in statement.names:
                if (alias.asname or alias.name) == rest[0] and statement.module:
                    return _problem_here([*statement.module.split("."), alias.name, *rest[1:]], depth + 1)
    return f"names '{rest[0]}', which {file.relative_to(ROOT)} does not define as a class"


def _module(parts: list[str]) -> tuple[Path | None, list[str]]:
    """The file of the longest prefix that is a module, and what remains."""
    for end in range(len(parts), 0, -1):
        stem = ROOT.joinpath(*parts[:end])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file, parts[end:]
    return None, parts


def _problem_in_class(found: ast.ClassDef, rest: list[str]) -> str | None:
    if not rest:
        return None
    for statement in found.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == rest[0]:
            names = {node.id for node in statement.decorator_list if isinstance(node, ast.Name)}
            return None if "classmethod" in names else f"names '{rest[0]}', which is no classmethod of {found.name}"
    # it may be inherited: the source of one class does not tell
    return None if found.bases else f"names '{rest[0]}', which {found.name} does not have"


def check_folder(folder: Path) -> tuple[list[str], int]:
    """Problems below a folder, and the number of targets looked at."""
    problems, count = [], 0
    for file in sorted(folder.rglob("*.y*ml")):
        for place, target in targets(yaml.safe_load(file.read_text(encoding="utf-8"))):
            count += 1
            if problem := problem_of(target):
                problems.append(f"{file}: {place}: '{target}' {problem}")
    return problems, count


def main(argv: list[str]) -> int:
    folders = [Path(argument) for argument in argv] or [ROOT / "experiments"]
    results = [check_folder(folder) for folder in folders]
    for problem in (line for problems, _ in results for line in problems):
        print(f"error: {problem}", file=sys.stderr)
    bad, count = sum(len(problems) for problems, _ in results), sum(count for _, count in results)
    print(f"{count} targets, {bad} of them wrong")
    return 2 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
