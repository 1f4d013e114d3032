"""Trainings started from the page: an experiment file with overrides, checked, and run by the ordinary command on its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.plain_files import write_json, writing
from umm_zoo.errors import Problem, UserError
from umm_zoo.experiment.file import ENVELOPE, Experiment, earlier_stages, load_experiment
from umm_zoo.experiment.importing import importing
from umm_zoo.experiment.shipped import PREFIX, shipped_folder
from umm_zoo.training.lock import Holder, in_progress
from umm_zoo.training.run_folder import RunFolder

#: In a run folder: what the page keeps of a training that it has started.
PLACE = "play"
RECORD = "launch.json"
#: The ordinary command.
FIT = [sys.executable, "-m", "umm_zoo.fit"]
#: Seconds that ``--check`` may take.
PATIENCE = 600


@dataclass(frozen=True)
class Plan:
    """A training that somebody has in mind.

    Args:
        file: experiment file, as ``experiment_files`` names it.
        overrides: ``key=value``.
        runs: folder of the run folders, as ``--runs`` takes it; None is the default.
        resume: go on from the last checkpoint.
    """

    file: str
    overrides: Sequence[str] = ()
    runs: str | None = None
    resume: bool = False

    @property
    def words(self) -> list[str]:
        """Words behind ``python -m umm_zoo.fit``."""
        more = [f"--runs={self.runs}"] if self.runs else []
        own = [*self.overrides, *(["ckpt=last"] if self.resume else [])]
        return [*more, *behind([self.file, *own])]

    @property
    def line(self) -> str:
        """The whole command."""
        return shlex.join(["python", "-m", "umm_zoo.fit", *self.words])

    def experiment(self) -> Experiment:
        """The experiment; a ``UserError`` where it cannot be read."""
        return load_experiment(self.file, self.overrides)

    def folder(self) -> Path:
        """Its run folder; a ``UserError`` where the experiment cannot be read."""
        return RunFolder.of(self.experiment(), self.runs).path


def behind(words: Sequence[str]) -> list[str]:
    """Words of which none is taken for an option."""
    return ["--", *words] if any(word.startswith("-") for word in words) else list(words)


def experiment_files() -> list[str]:
    """Experiment files of the current folder, of ``experiments`` in it, and those that ship, as the command takes them."""
    here, shipped = Path.cwd(), shipped_folder()
    own = [path.relative_to(here) for path in (*here.glob("*.y*ml"), *(here / "experiments").rglob("*.y*ml"))]
    names = [str(path) for path in own if is_experiment(path)]
    if not (here / "experiments").is_dir() or not shipped.samefile(here / "experiments"):
        names += [PREFIX + path.relative_to(shipped).as_posix() for path in shipped.rglob("*.yaml") if is_experiment(path)]
    return sorted(names, key=lambda name: (name.startswith(PREFIX), name.count("/"), name))


def is_experiment(path: Path) -> bool:
    """Whether a file has the keys of an experiment at its top; comparisons and lists have others."""
    try:
        keys = set(re.findall(r"^([A-Za-z_]\w*):", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    except (OSError, UnicodeDecodeError):
        return False
    return bool(keys & {"method", "base"}) and keys <= set(ENVELOPE)


def fields_of(plan: Plan) -> dict[str, Any]:
    """Values of an experiment by dotted key, lists whole; empty where it cannot be read."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))
        elif path:
            found[path] = value

    try:
        walk(plan.experiment().resolved(), "")
    except UserError:
        return {}
    return found


def problems_of(plan: Plan) -> list[Problem]:
    """What the checker has to say: of the file, of every class it names and of all their arguments."""
    try:
        experiment = plan.experiment()
        with importing():
            from umm_zoo.experiment.check import check
        for stage in (*earlier_stages(experiment), experiment):
            check(stage)
    except UserError as error:
        return error.problems
    return []


def beside(problems: Sequence[Problem], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Problems by the override that they are about, and all others."""
    own, rest = [list[str]() for _ in keys], list[str]()
    for problem in problems:
        about = (i for i, key in enumerate(keys) if key and (problem.where == key or problem.where.startswith(f"{key}.")))
        place = next(about, None)
        (rest if place is None else own[place]).append(str(problem))
    return ["\n".join(lines) for lines in own], rest


def overrides_of(keys: Sequence[str | None], values: Sequence[str | None]) -> list[str]:
    """``key=value`` of the rows that have both."""
    pairs = zip(keys, values, strict=True)
    return [f"{key.strip()}={value}" for key, value in pairs if key and key.strip() and value and value.strip()]


def checked(plan: Plan) -> str:
    """What ``fit --check`` prints."""
    try:
        done = subprocess.run(
            [*FIT, "--check", *plan.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return f"the check took more than {PATIENCE} s"
    return done.stdout.strip()


def launch(plan: Plan) -> Path:
    """Start it in a session of its own, which nothing ends but its end or ``following.stop``; returns its run folder.

    Raises:
        UserError: the experiment cannot be read, something is trained in its folder, or that cannot be written.
    """
    folder = plan.folder()
    before = launched(folder)
    if in_progress(folder) or (before is not None and before.holder.ended() is False):
        raise UserError(folder, "a run in progress", "a folder in which nothing is trained", "name=… for another one")
    output = f"training-{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.txt"
    with writing(folder / PLACE):
        (folder / PLACE).mkdir(parents=True, exist_ok=True)
        with (folder / PLACE / output).open("wb") as stream:
            process = subprocess.Popen(
                [*FIT, *plan.words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        record = {"process": asdict(Holder.of(process.pid)), "command": plan.line, "output": output, "time": time.time()}
        write_json(folder / PLACE / RECORD, record)
    threading.Thread(target=process.wait, name="training", daemon=True).start()  # or its end would leave a zombie
    return folder


@dataclass(frozen=True)
class Launched:
    """A training that the page has started.

    Args:
        holder: its process.
        command: the line that does the same.
        output: file of what it prints.
    """

    holder: Holder
    command: str
    output: Path


def launched(folder: Path) -> Launched | None:
    """The last training that was started in a run folder from a page, this one or another; None where there is none."""
    try:
        record = json.loads((folder / PLACE / RECORD).read_text(encoding="utf-8"))
        return Launched(Holder(**record["process"]), str(record["command"]), folder / PLACE / Path(str(record["output"])).name)
    except (OSError, ValueError, TypeError, KeyError):
        return None
