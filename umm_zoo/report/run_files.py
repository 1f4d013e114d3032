"""What a run folder tells, read for a page: scores, curves, samples, data, costs. Nothing here imports torch."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from umm_zoo.errors import UserError
from umm_zoo.experiment.plain_yaml import yaml_tree
from umm_zoo.training.lock import in_progress
from umm_zoo.training.log_file import NAME, read_log
from umm_zoo.training.run_folder import RunFolder

State = Literal["finished", "running", "stopped"]

#: ``(step, value)`` in the order of the steps.
Curve = list[tuple[int, float]]

_STEP = re.compile(r"step-(\d+)\.png")

_NUMBER = (int, float, type(None))
_WHERE: Any = {"machine": {}, "versions": {}}

#: What pages read of each file: a type, a list of one shape, or a map, in which ``*`` stands for every other key.
_EXPERIMENT: Any = {"method": {}, "metrics": {}}
_RECORD: Any = _WHERE | {"metrics": {"*": _NUMBER}, "costs": {"*": _NUMBER}, "steps": int, "seconds": _NUMBER, "experiment": str}
_FACTS: Any = _WHERE | {"parts": [{"name": str, "class": str, "trained": int, "frozen": int}]}
_LEDGER: Any = {split: {"*": {"skips": [object]}} for split in ("train", "val")}
_HISTORY: Any = [{"changed": {}}]
_CARD: Any = {"scores": {"*": _NUMBER}, "headline": str}


@dataclass
class Reference:
    """A value that a score is to be read against: its ceiling, or what answers are worth that no image is looked at for."""

    name: Literal["ceiling", "prior"]
    value: float


@dataclass
class RunFiles:
    """Files of one run.

    Args:
        folder: where they are.
        experiment: the resolved one, plain.
        record: ``metrics.json``; empty while the run has not finished.
        facts: ``report.json``, what a folder lacks otherwise: the command, the parts and their sizes, the steps there will be.
        curves: by logged name.

    Raises:
        UserError: it is no run folder.
    """

    folder: RunFolder
    experiment: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> RunFiles:
        """Read what there is; a file that is missing, or damaged, leaves its part empty."""
        folder = RunFolder(path)
        try:
            experiment = yaml_tree(folder.experiment_file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            experiment = None
        if not isinstance(experiment, dict) or "name" not in experiment:
            raise UserError(path, "no experiment.yaml of a run", "a run folder, such as runs/llava/shapes")
        curves: dict[str, Curve] = {}
        for _, row in read_log(folder.logs / NAME).rows:
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
        record, facts = _json(folder.metrics_file, _RECORD), _json(folder.facts_file, _FACTS)
        return cls(folder, sound(experiment, _EXPERIMENT), record, facts, curves)

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.experiment["name"])

    @property
    def method(self) -> str:
        """Class of the method."""
        return str(self.experiment.get("method", {}).get("_target_", "?")).rpartition(".")[2]

    @cached_property
    def state(self) -> State:
        """Finished, running, or stopped before its end."""
        if self.folder.finished():
            return "finished"
        return "running" if in_progress(self.folder.path) else "stopped"

    @cached_property
    def steps(self) -> int:
        """Optimiser steps so far, as far as the log tells."""
        return int(self.record.get("steps") or max((curve[-1][0] for curve in self.curves.values()), default=0))

    @cached_property
    def command(self) -> str:
        """The line that makes this run again."""
        file = self.record.get("experiment") or str(self.folder.experiment_file)
        return str(self.facts.get("command") or shlex.join(["python", "-m", "umm_zoo.fit", file]))

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """What the run was made with, session by session."""
        found: list[dict[str, Any]] = sound(self.folder.history(), _HISTORY)
        return found

    @cached_property
    def commit(self) -> str:
        """Commit of this package, of the run's last session."""
        return str(self.record.get("commit") or (self.history[-1].get("commit") if self.history else "") or "not known")

    @cached_property
    def scores(self) -> dict[str, float | None]:
        """The last value of each name; null where no row was counted."""
        return self.record.get("metrics") or {name: curve[-1][1] for name, curve in sorted(self.curves.items())}

    @cached_property
    def samples(self) -> list[tuple[int, Path]]:
        """Sample grids by step."""
        found = [(_STEP.fullmatch(path.name), path) for path in self.folder.path.glob("samples/step-*.png")]
        return sorted((int(match[1]), path) for match, path in found if match)

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """``data.json``: what was read of every source, and what was skipped."""
        return _json(self.folder.path / "data.json", _LEDGER)

    @cached_property
    def benchmarks(self) -> list[tuple[Path, dict[str, Any]]]:
        """Scored benchmarks: page and card."""
        files = sorted(self.folder.path.glob("benchmarks/*/scored-*/benchmark.json"))
        return [(file.with_suffix(".html"), card) for file in files if (card := _json(file, _CARD))]

    @cached_property
    def references(self) -> set[str]:
        """Names that are there to read others against."""
        priors = {f"val/{metric}/" for metric in self.experiment.get("metrics") or {} if self._class_of(metric) == "LanguagePrior"}
        begin = (*priors, "val/oracle/")
        return {name for name in self.scores if name.startswith(begin) or name.endswith("_ceiling")}

    def reference(self, name: str) -> Reference | None:
        """What a score is to be read against, where the run has it.

        ``X_ceiling`` beside ``X``; of a metric named ``oracle`` the same score; of a ``LanguagePrior`` that of the same kind.
        """
        ceiling = self.scores.get(f"{name}_ceiling")
        stage, _, rest = name.partition("/")
        metric, _, score = rest.partition("/")
        if ceiling is None and metric == "unified":
            ceiling = self.scores.get(f"{stage}/oracle/{score}")
        if ceiling is not None:
            return Reference("ceiling", ceiling)
        metrics = self.experiment.get("metrics") or {}
        if self._class_of(metric) != "AnswerAccuracy":
            return None
        for other in metrics:
            if self._class_of(other) == "LanguagePrior":
                value = self.scores.get(f"{stage}/{other}/{'held_out' if score == 'overall' else score}")
                return None if value is None else Reference("prior", value)
        return None

    def _class_of(self, metric: str) -> str:
        node = (self.experiment.get("metrics") or {}).get(metric)
        return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, dict) else ""


def _json(file: Path, shape: dict[str, Any]) -> dict[str, Any]:
    try:
        found = sound(json.loads(file.read_text(encoding="utf-8")), shape)
    except (OSError, ValueError, RecursionError):
        return {}
    return found or {}


def sound(value: Any, shape: Any) -> Any:
    """What of a value has the shape that is read of it; None where nothing has. A key that the shape does not name is kept."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return None
        shapes = {key: shape.get(key, shape.get("*", object)) for key in value}
        return {key: own for key, one in value.items() if (own := sound(one, shapes[key])) is not None or _may_be_none(shapes[key])}
    if isinstance(shape, list):
        return [own for one in value if (own := sound(one, shape[0])) is not None] if isinstance(value, list) else None
    return value if isinstance(value, shape) else None


def _may_be_none(shape: Any) -> bool:
    return shape in (object, _NUMBER)
