"""Source of an experiment's classes that lie outside this package: a run is known by what stood in their files.

Followed are the modules of the classes that an experiment names, and the modules that these import, unless they are installed. What
a module reads, or imports by other means than an ``import`` statement, is not seen. Nothing is imported here.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.types import TARGET

_OURS = ("umm_zoo", "data_pipelines")
_INSTALLED = [Path(path).resolve() for path in set(sysconfig.get_paths().values())]


def sources_of(experiment: Experiment) -> dict[str, str]:
    """Dotted names of the user's modules, and the sha256 of each file (its first 16 digits)."""
    return _checksums(_files(experiment))


def _checksums(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in sorted(files.items())}


def code_of(experiment: Experiment) -> dict[str, Any]:
    """The record of the user's code: ``modules`` (see ``sources_of``) and the ``commits`` of their folders, if any."""
    files = _files(experiment)
    folders = sorted({str(file.parent) for file in files.values()})
    commits = {folder: commit for folder in folders if (commit := commit_of(Path(folder)))}
    return {"modules": _checksums(files), "commits": commits}


def commit_of(folder: Path) -> str | None:
    """The commit of a source tree, with ``+`` where it has been changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]  # no tag, the whole hash
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def commit_of_package() -> str | None:
    """The commit of this package, asked for once: what a process has imported stays as it was."""
    return commit_of(Path(__file__).resolve().parent)


def _files(experiment: Experiment) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for target in dict.fromkeys(_targets(experiment.resolved())):
        _follow(target, found)
    return found


def _targets(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        if isinstance(tree.get(TARGET), str):
            yield tree[TARGET]
        for value in tree.values():
            yield from _targets(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _targets(value)


def _follow(path: str, found: dict[str, Path]) -> None:
    """Add the modules on a dotted path, from the outermost package on, and what they import."""
    parts = path.split(".")
    if parts[0] in _OURS or parts[0] in sys.stdlib_module_names:
        return
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    file = Path(spec.origin).resolve() if spec.origin and spec.has_location else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any(place.is_relative_to(installed) for place in [file, *folders] if place for installed in _INSTALLED):
        return
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if end > 1:
            tried = [folder / f"{parts[end - 1]}{ending}" for folder in folders for ending in (".py", "/__init__.py")]
            file = next((path for path in tried if path.is_file()), None)
            folders = [folder / parts[end - 1] for folder in folders if (folder / parts[end - 1]).is_dir()]
        if file is not None and file.is_file() and name not in found:
            found[name] = file
            source = file.read_bytes() if file.suffix == ".py" else b""
            for imported in _imports(source, name if folders else name.rpartition(".")[0]):
                _follow(imported, found)
        if not folders:
            return


@lru_cache(maxsize=1024)
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    """Dotted paths that a module imports, or may: ``from a import b`` gives ``a.b``."""
    return tuple(_imported(source, package))


def _imported(source: bytes, package: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
