"""A finished run, loaded once and asked again and again: one request at a time, each kept in its history."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from umm_zoo.errors import UserError, printable
from umm_zoo.generation import COMMANDS, abilities_of
from umm_zoo.generation.abilities import own_sampling
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import Generate
from umm_zoo.generation.requests import Request
from umm_zoo.generation.running import run_batch
from umm_zoo.play.commands import RunWords
from umm_zoo.play.history import Entry, History, entries_of
from umm_zoo.play.watch import Report, Watch
from umm_zoo.training.finished_run import load_run
from umm_zoo.training.report import circumstances

#: Which of a method's scales of guidance a command's own is.
_SCALES = {"text-to-image": "text", "edit": "edit", "compose": "composition"}

#: One request at a time, whatever the run: drawn words take the random numbers of the whole process.
_TURN = threading.Lock()


class LoadedRun:
    """A run that somebody tries out.

    Args:
        words: which run, and on which device.
        history: folder of its history; None is ``play`` in the run's own folder.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, words: RunWords, history: Path | None = None) -> None:
        run = load_run(words.run, (), words.trust, words.raw_weights)
        self.words, self.folder, self.weights = words, run.path, run.weights
        self.name, self.step = str(run.experiment.name), run.checkpoint.get("global_step")
        self.model = run.load_model(words.device)
        self.method = type(self.model.method).__name__
        self.history = History(history or run.path / "play")
        self.abilities = abilities_of(self.model.method)
        self._watch = Watch(self.model.method)
        self._commit = circumstances()["commit"]

    def own(self, command: Command, setting: str) -> Any:
        """The run's own value of a setting where none is said; None where it has none, or is not known."""
        if (default := command.options[setting].default) is not None:
            return default
        found = own_sampling(self.model.method)
        scales = found.get("guidance")
        if isinstance(scales, dict) and setting in ("guidance", "image_guidance"):
            name = next((name for name, other in COMMANDS.items() if other is command), "")
            return scales.get("reconstruction" if setting == "image_guidance" else _SCALES.get(name, ""))
        return found.get(setting)

    def answer(
        self, name: str, requests: Sequence[Request], given: dict[str, Any], report: Report, cancelled: threading.Event
    ) -> Iterator[Entry]:
        """Results of requests of one command, each as soon as it is there; the method works on one at a time, whoever asks.

        Args:
            name: of the command.
            requests: whose images lie in the history.
            given: settings that the user has typed.
            report: see ``Watch.over``.
            cancelled: ends the work soon after it is set.

        Raises:
            UserError: a request does not suit the method.
            Cancelled: it was ended.
        """
        command = COMMANDS[name]
        with _TURN, self.history.call(len(requests)) as folder:
            for number, request in enumerate(requests):
                own = {key: value for key, value in request.settings.items() if key != "seed"}
                steps = own.get("steps") or self.own(command, "steps") if "steps" in own else None
                kind, began = (name, len(request.images), str(own)), time.monotonic()
                with self._watch.over(kind, steps, (number, len(requests)), report, cancelled):
                    (result,) = run_batch(self.model, command, [request], self.words.run)
                folder.about = {
                    "command": name,
                    "given": {**{key: value for key, value in given.items() if key != "num"}, "seed": request.settings["seed"]},
                    "inputs": [path.name for path in request.images if isinstance(path, Path)],
                    "own": self._unsaid(command, request),
                    "seconds": round(time.monotonic() - began, 2),
                    "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                    "run": self.words.run,
                    "step": self.step,
                    "weights": self.weights,
                    "commit": self._commit,
                }
                folder.add(result)
                yield entries_of(folder.path)[-1]

    def _unsaid(self, command: Command, request: Request) -> dict[str, Any]:
        """The run's own values of the settings that nobody has set, as far as they are known."""
        unset = [name for name in command.options_of(self.model.method) if request.settings.get(name) is None]
        return {name: value for name in unset if (value := self.own(command, name)) is not None}

    def about(self) -> str:
        """One line: method, steps trained, weights."""
        steps = [] if self.step is None else [f"{self.step:,} step{'' if self.step == 1 else 's'} trained"]
        return printable(", ".join([self.method, *steps, *(["averaged weights"] if self.weights == "averaged" else [])]))


def labels(runs: Sequence[LoadedRun]) -> list[str]:
    """What each run is called beside the others: its name, or its path where two have one name."""
    alike = len({run.name for run in runs}) < len(runs)
    return [printable(run.words.run if alike else run.name) for run in runs]


def shared_abilities(runs: Sequence[LoadedRun]) -> list[str]:
    """Commands that every run can do.

    Raises:
        UserError: there is none.
    """
    names = [name for name in runs[0].abilities if all(name in run.abilities for run in runs)]
    if not names:
        able = "; ".join(f"{run.words.run}: {', '.join(run.abilities) or 'nothing that can be tried'}" for run in runs)
        whose = "both runs have" if len(runs) > 1 else "the run has"
        raise UserError("", f"no ability that {whose} ({able})", "runs that answer or generate")
    return sorted(names, key=lambda name: COMMANDS[name].out != Generate.out)  # what generates comes first
