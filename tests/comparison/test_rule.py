"""Whether a rule was committed before the runs is looked up, not asserted."""

from __future__ import annotations

import subprocess
from pathlib import Path

from umm_zoo.comparison.rule import BEFORE, rule_status


def commit(folder: Path, rule: str) -> str:
    """A commit of a compare file with a rule."""
    (folder / "c.yaml").write_text(f"question: Which?\ndecision: >\n  {rule}\n")
    given = ["git", "-c", "user.name=a", "-c", "user.email=b@c"]
    for words in (["init", "-q"], ["add", "."], [*given[1:], "commit", "-q", "-m", rule]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_a_rule_is_looked_up_in_the_commits_of_the_runs(tmp_path: Path) -> None:
    first, second = commit(tmp_path, "The better by 2."), commit(tmp_path, "The better by 1.")
    file = tmp_path / "c.yaml"
    assert rule_status(file, "The better\n  by 2.", [first, first + "+"]) == BEFORE
    assert (
        rule_status(file, "The better by 1.", [second, first])
        == f"another one in {first[:9]}, with which runs were made: it was changed after them"
    )


def test_a_file_that_no_commit_has_is_not_known(tmp_path: Path) -> None:
    known = commit(tmp_path, "The better.")
    (tmp_path / "new.yaml").write_text("decision: The better.\n")
    assert rule_status(tmp_path / "new.yaml", "The better.", [known]).startswith(f"not in {known[:9]}")
    assert rule_status(tmp_path / "c.yaml", "The better.", ["0" * 40]).startswith("not in 000000000")
    assert rule_status(tmp_path / "c.yaml", "The better.", ["None"]).startswith("not in None")
