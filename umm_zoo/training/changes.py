"""Changes of an experiment between two sessions of its run: which are refused, and how the others come into force.

A checkpoint holds the optimiser's and the schedule's old settings beside their state, and so do some callbacks: put back with the
state, they would win over those of the experiment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from umm_zoo.checkpoints.files import describe
from umm_zoo.errors import Problem, UserError, say
from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.sources import code_of, commit_of_package
from umm_zoo.experiment.types import TARGET
from umm_zoo.training.run_folder import RunFolder, changed_modules, differences

#: Keys whose values have gone into others, or that name the run.
_ASIDE = ("name", "vars")
#: Keys that decide what the state in a checkpoint is the state of, beside those of the method.
_REFUSED = ("seed", "after", "training.trained", f"training.optimizer.{TARGET}", f"data.{TARGET}")


@dataclass
class Changes:
    """What a run is continued with that it was not trained with so far.

    Args:
        step: from which on.
        values: dotted key -> (old value, new value); None is nothing.
        modules: the user's modules whose source is another one now.
        history: of the run, this session included, see ``RunFolder.history_file``.
    """

    step: int = 0
    values: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def since(cls, checkpoint: Path | None, experiment: Experiment, start: Path | None = None) -> Changes:
        """The changes since a checkpoint; with none, the history begins, with the code that ``start`` was trained with.

        Raises:
            UserError: a change that the weights or the order of the data do not allow, by its key.
        """
        now: dict[str, Any] = {"commit": commit_of_package(), "code": code_of(experiment)}
        if checkpoint is None:
            below = {"below": modules} if start is not None and (modules := RunFolder(start).modules()) else {}
            return cls(history=[{"from_step": 0, "experiment": experiment.resolved(), **below, **now}])
        found = describe(checkpoint)
        old, new = found.get("experiment", experiment.resolved()), experiment.resolved()
        keys = [key for key in differences(old, new) if key.split(".")[0] not in _ASIDE]
        values = {key: (_value(old, key), _value(new, key)) for key in keys}
        history = list(found.get("history") or [{"from_step": 0, "experiment": old}])
        known = history[-1].get("code", {}).get("modules", {})
        changes = cls(int(found.get("global_step", 0)), values, changed_modules(known, now["code"]["modules"]), history)
        changes.refuse(experiment.file, checkpoint)
        if changes.values or any(history[-1].get(key) != now[key] for key in now):
            changed = {key: {"was": was, "now": value} for key, (was, value) in values.items()}
            history.append({"from_step": changes.step, "changed": changed, **now})
        return changes

    def refuse(self, file: str, checkpoint: Path) -> None:
        """Refuse what changes the meaning of the weights, or the order of the data; ``ShardData`` knows more about the latter."""
        problems, kind = [], f"method.{TARGET}"  # another class explains all that is different inside
        for key, (was, now) in ({kind: self.values[kind]} if kind in self.values else self.values).items():
            moved = isinstance(was, str) and isinstance(now, str) and Path(was).name == Path(now).name
            meaning = key.startswith(("method.", "adapters")) and not (moved and TARGET not in key)
            if meaning or key in _REFUSED:
                hint = f"a new run may start from these weights: name=… after={checkpoint}"
                problems.append(Problem(key, _shown(now), f"{_shown(was)}, with which this run was trained so far", hint))
        steps = self.values.get("trainer.max_steps", (None, None))[1]
        if isinstance(steps, int) and 0 <= steps < self.step:
            found = f"{steps}, fewer than the {self.step} that this run has taken"
            problems.append(Problem("trainer.max_steps", found, f"{self.step} or more, or ckpt=PATH of an earlier checkpoint"))
        if problems:
            raise UserError(file, problems)

    def say(self) -> None:
        """One line on stderr per change."""
        lines = [f"resumes with {key} {_shown(now)} (was {_shown(was)})" for key, (was, now) in self.values.items()]
        lines += [f"resumes with {name} as its file is now (it has changed since)" for name in self.modules]
        for line in lines:
            say(line, stderr=True)


class ChangedSettings(Callback):
    """Lets the experiment's settings win over those that a checkpoint has put back, where they differ.

    Args:
        changes: since the checkpoint.
        callbacks: the experiment's own, by name.
    """

    def __init__(self, changes: Changes, callbacks: Mapping[str, Callback]) -> None:
        self.changes = changes
        self._groups: list[list[dict[str, Any]]] = []
        keys = [key.split(".") for key in changes.values if key.startswith("callbacks.")]
        named = [(callbacks[key[1]], key[2]) for key in keys if len(key) > 2 and key[1] in callbacks]
        self._attributes = [(callback, name, getattr(callback, name)) for callback, name in named if hasattr(callback, name)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the settings as they were built."""
        self._groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them in."""
        for callback, name, value in self._attributes:
            setattr(callback, name, value)
        if not any(key.startswith("training.") for key in self.changes.values):
            return
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                for name in [*group]:
                    if name not in settings and name != "params":
                        del group[name]
                group.update(settings)
        for config in trainer.lr_scheduler_configs:
            self._reschedule(config.scheduler, trainer.global_step)

    def _reschedule(self, scheduler: Any, step: int) -> None:
        if not isinstance(scheduler, LambdaLR):
            keys = ", ".join(key for key in self.changes.values if key.startswith("training."))
            found = f"a change under a {type(scheduler).__name__}, which goes on from its own old settings"
            raise UserError(keys, found, "the old values, or a schedule that is a function of the step")
        optimizer: Optimizer = scheduler.optimizer
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler.last_epoch = scheduler.last_epoch or step  # where there was no schedule so far
        rates = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, factor in rates:
            group["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {value[TARGET]}" if TARGET in value else f"a map of {', '.join(map(str, value)) or 'nothing'}"
    text = "nothing" if value is None else str(value)
    return text if len(text) < 80 else f"{text[:77]}..."
