"""The folder of one run: what is written there, and whether a new run may use it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from umm_zoo.checkpoints.background import wait_for_writers
from umm_zoo.checkpoints.folder import PARTIAL, CheckpointFolder
from umm_zoo.checkpoints.plain_files import strict_json, write_whole
from umm_zoo.errors import UserError
from umm_zoo.experiment.file import Experiment, earlier_stages
from umm_zoo.experiment.plain_yaml import yaml_text, yaml_tree
from umm_zoo.experiment.sources import sources_of
from umm_zoo.training.ranks import is_main_process

#: What may be done next with a run folder.
Step = Literal["fresh", "resume", "finished"]
#: Seconds for which a rank waits for what rank 0 is writing before it says what there is.
_PATIENCE = 30.0


def runs_folder(runs: str | Path | None = None) -> Path:
    """The folder of all run folders: ``runs``, the environment variable UMM_ZOO_RUNS, or else ``runs`` in the current directory."""
    return Path(runs or os.environ.get("UMM_ZOO_RUNS") or "runs")


class RunFolder:
    """The folder ``<runs>/<name>/``: the resolved experiment, checkpoints, logs, samples, and in the end ``metrics.json``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.logs = self.path / "logs"
        self.metrics_file = self.path / "metrics.json"
        self.experiment_file = self.path / "experiment.yaml"
        self.history_file = self.path / "history.json"
        self.facts_file = self.path / "report.json"
        self.page_file = self.path / "report.html"

    @classmethod
    def of(cls, experiment: Experiment, runs: str | Path | None = None) -> RunFolder:
        """The folder of an experiment below that of all runs."""
        return cls(runs_folder(runs) / experiment.name)

    @cached_property
    def checkpoints(self) -> CheckpointFolder:
        """Its checkpoints."""
        return CheckpointFolder(self.path / "checkpoints")

    def finished(self) -> bool:
        """Whether a run came to its end here."""
        return self.metrics_file.is_file()

    def began(self) -> bool:
        """Whether a training has come as far as its first step here."""
        return self.history_file.is_file()

    def differences(self, experiment: Experiment) -> list[str]:
        """Dotted keys in which the stored experiment differs from ``experiment``."""
        try:
            stored = yaml_tree(self.experiment_file.read_text(encoding="utf-8")) if self.experiment_file.is_file() else {}
        except (yaml.YAMLError, UnicodeDecodeError):  # damaged: as different as can be
            stored = {}
        stored = stored if isinstance(stored, Mapping) else {}
        return differences(stored, experiment.resolved())

    def history(self) -> list[dict[str, Any]]:
        """What the run was made with, and from which step on; empty where it does not say.

        The first entry has the experiment; each further one what a later session has ``changed``; all of them the commit of this
        package, and the ``code`` of the user's own modules.
        """
        try:
            found = json.loads(self.history_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else []

    def changed_code(self, experiment: Experiment, below: Iterable[Experiment] = ()) -> list[str]:
        """The user's modules that are no longer those which the run, and the stages ``below`` it, were made with."""
        if not (history := self.history()):
            return []
        changed = changed_modules(history[-1].get("code", {}).get("modules", {}), sources_of(experiment))
        inherited = history[0].get("below", {})
        return sorted({*changed, *(name for stage in below for name in changed_modules(inherited, sources_of(stage)))})

    def modules(self) -> dict[str, str]:
        """Checksums of the user's modules that the weights here were made with, those of earlier stages included."""
        history = self.history()
        return {**history[0].get("below", {}), **history[-1].get("code", {}).get("modules", {})} if history else {}

    def stored_name(self) -> str | None:
        """The name in the stored experiment, read from its own line alone: a comparison asks every run there is."""
        if not self.experiment_file.is_file():
            return None
        with self.experiment_file.open(encoding="utf-8", errors="replace") as lines:
            return next((line[5:].strip().strip("'\"") for line in lines if line.startswith("name:")), None)

    def decide(self, experiment: Experiment, ckpt: str | None, again: bool) -> Step:
        """The next step for the folder.

        Args:
            experiment: the one to run.
            ckpt: ``last``, the path of a checkpoint, or None.
            again: throw away what is there.

        Raises:
            UserError: the folder holds another experiment or an unfinished run.
        """
        others = [path for path in self.path.glob("*.*") if path.suffix != PARTIAL]  # a run killed at its first write leaves one
        if self.path.exists() and not self.experiment_file.is_file() and (not self.path.is_dir() or others):
            raise UserError(self.path, "files that no run wrote", "a run folder or a new one (name=… or --runs DIR)")
        if again and not ckpt:
            return "fresh"
        different = self.differences(experiment) if self.experiment_file.is_file() else []
        if ckpt is None:
            if self.checkpoints.newest() is None and not self.finished():
                return "fresh"  # a run that died before its first checkpoint has nothing to lose
            options = "name=… for another folder, --again to start over"
            if different:
                found = f"a run of another experiment (other {few(different)})"
                raise UserError(self.path, found, f"{options}, ckpt=last to continue it all the same")
            if self.finished():
                self.refuse_changed_code(experiment, options)
                return "finished"
            raise UserError(self.path, "an unfinished run of this experiment", f"ckpt=last to continue it, {options}")
        if ckpt == "last" and self.finished() and not different:
            self.refuse_changed_code(experiment, "--again to run it again")
            return "finished"
        return "resume"

    def refuse_changed_code(self, experiment: Experiment, options: str) -> None:
        """Refuse to take a run for this one's where its classes have been edited since.

        Raises:
            UserError: names the modules.
        """
        if changed := self.changed_code(experiment, earlier_stages(experiment)):
            found = f"a run of other code ({few(changed)} {'has' if len(changed) == 1 else 'have'} changed since)"
            raise UserError(self.path, found, options)

    def follow(self, experiment: Experiment, ckpt: str | None, again: bool) -> Step:
        """The decision of rank 0, by another rank, which may see the folder while rank 0 is already changing it."""
        if not self.differences(experiment) and self.finished() and not again and ckpt in (None, "last"):
            return "finished"
        return "resume" if ckpt else "fresh"

    def resume_path(self, ckpt: str, file: str) -> Path:
        """The checkpoint that ``ckpt=…`` means: for ``last`` the newest intact one.

        Raises:
            UserError: there is none, or none that is intact.
        """
        try:
            path = self.checkpoints.latest() if ckpt == "last" else Path(ckpt)
        except UserError as error:
            error.locate(advice="--again starts over")
            raise
        if path is None or not path.exists():
            none = f"'{ckpt}', but there is no {f'checkpoint in {self.checkpoints.path}' if path is None else 'such file'}"
            raise UserError("ckpt", none, "'last' or the path of a checkpoint", file=file)
        return path

    def clear(self, experiment: Experiment) -> None:
        """Begin, and first remove what an earlier run wrote; nothing else, for the folder may hold other runs or a user's notes."""
        # the experiment stays until the new one takes its place: without it the folder would be none of a run
        own = (self.metrics_file, self.history_file, self.facts_file, self.page_file)
        for left in (*own, *self.path.glob("evaluation-*.json")):
            left.unlink(missing_ok=True)
        for folder in ("checkpoints", "logs", "samples"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        self.begin(experiment)

    def begin(self, experiment: Experiment, history: list[dict[str, Any]] | None = None) -> None:
        """Make it the folder of this experiment, which has not finished yet."""
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        self.metrics_file.unlink(missing_ok=True)  # first: at no moment has another experiment finished here
        write_whole(self.experiment_file, experiment.to_yaml())
        if history is not None:
            write_whole(self.history_file, strict_json(history, indent=1) + "\n")

    def finish(self, experiment: Experiment, report: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, whole or not at all."""
        self.begin(experiment)  # where no step was left to do, nothing has begun
        write_whole(self.metrics_file, strict_json(report, indent=2) + "\n")

    def advice(self) -> str:
        """Advice on how to go on with a training that an error has ended, once the checkpoint that is being written stands."""
        wait_for_writers()
        if not is_main_process():  # it is rank 0 that writes
            self.checkpoints.wait(_PATIENCE)
        if kept := self.checkpoints.newest():
            return f"{kept} is kept; continue from it with ckpt=last"
        return f"{self.path} holds no checkpoint yet; start again"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which two resolved experiments differ."""
    return sorted(_differences(_comparable(old), _comparable(new), ""))


def changed_modules(known: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the modules in both whose source differs."""
    return [name for name, checksum in known.items() if now.get(name, checksum) != checksum]


def _comparable(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Through YAML and back, and ``after`` by its file name: the same project may lie elsewhere today."""
    plain: dict[str, Any] = yaml_tree(yaml_text(dict(tree)))
    return {"adapters": {}, "loggers": {}, **plain, "after": Path(plain["after"]).name if plain.get("after") else None}


def _differences(old: Any, new: Any, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d for key in {**old, **new} for d in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if old == new else [where]


def few(keys: list[str]) -> str:
    """The first three of some keys."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
