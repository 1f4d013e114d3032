"""Whether the rule of a comparison stood in the repository before its runs were made."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

#: What is said of a rule that every run's commit holds as it is now.
BEFORE = "committed before the runs"


def rule_status(file: Path, decision: str, commits: Iterable[str]) -> str:
    """What the commits that runs were made with know of the rule in a compare file.

    Args:
        file: the compare file.
        decision: the rule as it is now.
        commits: of the runs, as ``metrics.json`` has them: of this package, with ``+`` where its tree had changes. They know
            nothing of a file of another repository.
    """
    for commit in dict.fromkeys(commit.rstrip("+") for commit in commits):
        stored = _at(file, commit)
        if stored is None:
            return f"not in {commit[:9] or 'a commit'}, with which runs were made: whether it was written before them is not known"
        if " ".join(str(stored.get("decision", "")).split()) != " ".join(decision.split()):
            return f"another one in {commit[:9]}, with which runs were made: it was changed after them"
    return BEFORE


def _at(file: Path, commit: str) -> dict[str, Any] | None:
    """A YAML map as it was in a commit; None where there was none."""
    command = ["git", "show", f"{commit}:./{file.name}"]
    try:
        shown = subprocess.run(command, cwd=file.resolve().parent, capture_output=True, text=True, check=True, timeout=10)
        found = yaml.safe_load(shown.stdout)
    except (OSError, subprocess.SubprocessError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None
