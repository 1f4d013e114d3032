"""Arms in turns: each turn in a process of its own, so that other load on the machine meets all arms, and memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.benchmarks.base import Numbers
from tools.benchmarks.turn import HERE, benchmark
from umm_zoo.errors import UserError


@dataclass
class Arm:
    """One arm of a benchmark at one setting, of one checkout, and what its turns gave.

    Args:
        benchmark, setting, arm: names.
        tree: name of the other checkout; empty for this one.
        left_out: why it did not run.
        turns: numbers of each turn.
    """

    benchmark: str
    setting: str
    arm: str
    tree: str = ""
    left_out: str = ""
    turns: list[Numbers] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name in a table."""
        return f"{self.arm} at {self.tree}" if self.tree else self.arm


def arms_of(name: str, options: Namespace, trees: dict[str, Path]) -> list[Arm]:
    """Arms of a benchmark, those of this package once more for every other checkout, next to their own."""
    module, found = benchmark(name), list[Arm]()
    for setting, arm in module.cases(options):
        reason = module.missing(options, arm)
        found.append(Arm(name, setting, arm, left_out=reason))
        if arm in module.OWN and not reason:
            found += [Arm(name, setting, arm, tree) for tree in trees]
    return found


def in_turns(arms: Sequence[Arm], options: Namespace, trees: dict[str, Path], told: Callable[[], object] = lambda: None) -> None:
    """Run the turns of a benchmark's arms, setting by setting; ``told`` is called after every setting."""
    for setting in dict.fromkeys(arm.setting for arm in arms):
        for number in range(options.repeats):
            running = [arm for arm in arms if arm.setting == setting and not arm.left_out]
            for arm in running[:: 1 if number % 2 == 0 else -1]:
                try:
                    arm.turns.append(turn(arm, options, trees.get(arm.tree, HERE)))
                except RuntimeError as problem:
                    arm.left_out = str(problem)
        told()


def turn(arm: Arm, options: Namespace, tree: Path) -> Numbers:
    """One turn.

    Raises:
        RuntimeError: the arm failed; its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "numbers.json"
        order: dict[str, Any] = {"tree": str(tree), "name": arm.benchmark, "setting": arm.setting, "arm": arm.arm}
        order |= {"options": vars(options), "out": str(out)}
        program, alone = [sys.executable, str(HERE / "tools" / "benchmarks" / "turn.py")], {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(program, input=json.dumps(order), capture_output=True, text=True, env=alone)
        if ran.returncode or not out.exists():
            raise RuntimeError((ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1])
        numbers: Numbers = json.loads(out.read_text(encoding="utf-8"))
        return numbers


@contextmanager
def checkout(place: str) -> Iterator[tuple[str, Path]]:
    """Name and folder of another checkout: a folder, or a commit, which is unpacked for as long as this lasts.

    Raises:
        UserError: neither.
    """

    def git(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True)

    folder = Path(place).resolve()
    if (folder / "umm_zoo").is_dir():
        commit = git(folder, "rev-parse", "--short", "HEAD").stdout.decode().strip()
        yield commit or folder.name, folder
        return
    commit = git(HERE, "rev-parse", "--short", "--verify", f"{place}^{{commit}}").stdout.decode().strip()
    if not commit:
        raise UserError("--against", f"'{place}'", "a commit of this repository, or the folder of another checkout")
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["tar", "x", "-C", unpacked], input=git(HERE, "archive", commit).stdout, check=True)
        yield commit, Path(unpacked)


def record(arms: Sequence[Arm], **more: Any) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return {**more, "arms": [asdict(arm) for arm in arms]}
