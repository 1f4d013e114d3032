"""Trainings watched: what a run folder tells of one, whoever has started it. Nothing here is remembered in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from umm_zoo.errors import UserError, printable
from umm_zoo.play.launching import PLACE, RECORD, launched
from umm_zoo.report.run_files import RunFiles
from umm_zoo.training.lock import in_progress
from umm_zoo.training.log_file import NAME
from umm_zoo.training.run_folder import RunFolder, runs_folder

#: Folders of a run in which no other run lies.
_INSIDE = ("checkpoints", "logs", "samples", "benchmarks", PLACE)
_DEEP = 6
_TAIL = 16_384

State = Literal["starting", "running", "finished", "stopped"]


@dataclass(frozen=True)
class Training:
    """A training as its folder tells it.

    Args:
        folder: of the run.
        state: ``starting`` until it holds the folder's lock: it imports, or trains an earlier stage.
        steps: so far.
        max_steps: that there will be; 0 where the folder does not say yet.
        lines: last ones that it printed; empty where it was not started from a page.
        command: the line that does the same.
        ours: whether it was started from a page, and can be stopped from one.
        page: when its page was written; 0 where there is none yet.
    """

    folder: Path
    state: State
    steps: int
    max_steps: int
    lines: list[str]
    command: str
    ours: bool
    page: int


def trainings(runs: str | None = None) -> dict[str, Path]:
    """Run folders by their names, the one that was last written to first."""
    root = runs_folder(runs)
    found = sorted(_folders(root), key=_written, reverse=True)
    return {path.relative_to(root).as_posix(): path for path in found}


def _folders(root: Path) -> Iterator[Path]:
    for place, inside, files in os.walk(root):
        path = Path(place)
        if path != root and ("experiment.yaml" in files or (path / PLACE / RECORD).is_file()):
            yield path
        deep = len(path.relative_to(root).parts) >= _DEEP
        inside[:] = [] if deep else [name for name in inside if name not in _INSIDE]


def _written(folder: Path) -> float:
    files = (folder / "experiment.yaml", folder / PLACE / RECORD, folder / "logs" / NAME, folder / "metrics.json")
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def follow(folder: Path) -> Training:
    """What a run folder tells now."""
    started = launched(folder)
    alive = started is not None and started.holder.ended() is False
    busy = in_progress(folder)
    run = RunFolder(folder)
    state: State = "running" if busy else "starting" if alive else "finished" if run.finished() else "stopped"
    log = run.logs / NAME
    steps, most, command = _read(folder, *(_changed(file) for file in (log, run.facts_file, run.metrics_file, run.experiment_file)))
    lines = tail(started.output) if started is not None else []
    page = _changed(run.page_file)
    return Training(folder, state, steps, most, lines, started.command if started else command, started is not None, page)


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=64)
def _read(folder: Path, *changed: int) -> tuple[int, int, str]:
    """Steps so far, steps that there will be, and the command; read again where a file has changed."""
    try:
        files = RunFiles.read(folder)
    except UserError:
        return 0, 0, ""
    most = files.facts.get("max_steps")
    return files.steps, most if isinstance(most, int) and most > 0 else 0, files.command


def tail(file: Path, count: int = 12) -> list[str]:
    """The last lines of what a command printed, as plain text; of a line that was written over and over, what stood there last."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [printable(line) for line in lines if line][-count:]


def stop(folder: Path) -> None:
    """Ask a training that was started from a page to save and end.

    Raises:
        UserError: it was started elsewhere, on another machine, or has ended.
    """
    started = launched(folder)
    if started is None:
        raise UserError(folder, "a training that was not started from a page", "one that was", "Ctrl-C in its terminal stops it")
    if (ended := started.holder.ended()) is not False:
        found = "a training on another machine" if ended is None else "a training that has ended"
        raise UserError(folder, found, "one that runs here")
    os.kill(started.holder.pid, signal.SIGTERM)
