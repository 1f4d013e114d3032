"""Check of a whole experiment against signatures and type hints; every problem is collected before anything is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from umm_zoo.errors import Problem, UserError, did_you_mean, nearest
from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.layers import NAMED
from umm_zoo.experiment.moved import GONE, Moved, where_now
from umm_zoo.experiment.targets import Target, find_target
from umm_zoo.experiment.trust import Trust
from umm_zoo.experiment.types import TARGET, class_name, describe, describe_slot, is_node, mismatches

#: Class whose arguments the map ``training`` holds.
TRAINING = "umm_zoo.training.setup.TrainingSetup"
#: What the commands give to the trainer themselves, and where an experiment file says it instead.
RESERVED = {"callbacks": "the map 'callbacks' of the experiment", "default_root_dir": "the option --runs of the command"}
#: Trainer arguments that have no meaning where the training data never ends: values that ask for nothing, and what to use instead.
_EPOCHS: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_epochs": ((None, -1), "trainer.max_steps"),
    "min_epochs": ((None, 0), "trainer.max_steps"),
    "check_val_every_n_epoch": ((None,), "trainer.val_check_interval, in optimiser steps"),
    "limit_train_batches": ((None, 1.0), "trainer.max_steps"),
    "overfit_batches": ((None, 0, 0.0), "a source with few samples"),
    "reload_dataloaders_every_n_epochs": ((None, 0), "nothing: the order of the samples goes on by itself"),
}
#: Trainer arguments that would spoil a run or do nothing in it: values that ask for nothing, and what to use instead.
_NOTHING: dict[str, tuple[tuple[Any, ...], str]] = {
    "fast_dev_run": ((None, False, 0), "trainer.max_steps=2 trainer.val_check_interval=1 name=trial (it would count as finished)"),
    "barebones": (
        (None, False),
        "a umm_zoo.callbacks.throughput.Throughput (nothing would be scored or kept)",
    ),
    "enable_model_summary": ((None, False), "fit FILE --check, which prints parts, parameters and memory"),
    "limit_test_batches": ((None, 1.0), "trainer.limit_val_batches (nothing is tested)"),
    "limit_predict_batches": ((None, 1.0), "trainer.limit_val_batches (nothing is predicted)"),
}
#: Lightning's callbacks that have no meaning here, and what to use instead.
_UNFIT = {
    "StochasticWeightAveraging": "umm_zoo.training.ema.EMA (this one waits for epochs)",
    "WeightAveraging": "umm_zoo.training.ema.EMA, which resumes exactly",
    "GradientAccumulationScheduler": "trainer.accumulate_grad_batches (data.batch_size is that of a whole step)",
    "BatchSizeFinder": "data.batch_size, and trainer.accumulate_grad_batches where memory ends",
    "Timer": "trainer.max_time (this one ends a run that cannot go on)",
    "LearningRateFinder": "training.optimizer.lr (it would change weights and random numbers before the first step)",
}


def check(experiment: Experiment) -> None:
    """Check every node, argument and value of an experiment; nothing is built.

    Raises:
        UserError: with every problem found.
    """
    importlib.invalidate_caches()
    checker, problems = _Checker(experiment.trust), list[Problem]()
    for path, node, kind in slots_of(experiment):
        problems += checker.slot(node, kind, path)
    problems += checker.inside({TARGET: TRAINING, **experiment.training}, "training")
    problems += checker.trainer(experiment.trainer) + _endless(experiment) + _unfit_callbacks(experiment)
    _refuse(problems, experiment.file)


def _endless(experiment: Experiment) -> list[Problem]:
    """Trainer arguments that count epochs, where the training data has none."""
    node = experiment.data
    if not is_node(node) or not getattr(experiment.trust.class_of(node), "endless", False):
        return []
    found = "but the training data has no epochs: it never ends"
    return [
        Problem(f"trainer.{key}", f"{experiment.trainer[key]}, {found}", instead)
        for key, (harmless, instead) in _EPOCHS.items()
        if experiment.trainer.get(key) not in harmless
    ]


def _unfit_callbacks(experiment: Experiment) -> list[Problem]:
    """Callbacks of Lightning that count epochs, or change what an optimiser step is made of."""
    problems = []
    for name, node in experiment.callbacks.items():
        kind = experiment.trust.class_of(node) if is_node(node) else None
        for parent in kind.__mro__ if kind is not None else ():
            if parent.__name__ in _UNFIT and parent.__module__.startswith("lightning."):
                problems.append(
                    Problem(f"callbacks.{name}", f"a {parent.__name__}, which does not fit here", _UNFIT[parent.__name__])
                )
    return problems


def check_node(node: Any, kind: type, path: str, trust: Trust, file: str | Path = "") -> None:
    """Check one node and all below it; nothing is built.

    Raises:
        UserError: with every problem found.
    """
    _refuse(_Checker(trust).slot(node, kind, path), file)


def _refuse(problems: list[Problem], file: str | Path) -> None:
    if moved := [problem for problem in problems if isinstance(problem, Moved)]:
        found = f"{len(moved)} keys or classes of an earlier version, such as {moved[0].where} ({moved[0].hint})"
        raise UserError(file, found, "those of this one", "python tools/migrate_experiment.py FILE rewrites a file")
    if problems:
        raise UserError(file, problems)


#: Classes of the envelope's own slots and maps of named nodes, by name: with them comes torch, and methods know this package.
_SLOTS = {
    "method": "umm_zoo.method.Method",
    "adapters": "umm_zoo.backbones.adapters.LoRA",
    "data": "lightning.LightningDataModule",
    "callbacks": "lightning.Callback",
    "metrics": "torchmetrics.Metric",
    "loggers": "lightning.pytorch.loggers.Logger",
}


def slot_class(path: str) -> type:
    """The class that a slot of the envelope must make."""
    module, _, name = _SLOTS[path.partition(".")[0]].rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def slots_of(experiment: Experiment) -> Iterable[tuple[str, Any, type]]:
    """(path, node, class it must be) of the envelope's own slots."""
    for name in _SLOTS:
        if name in NAMED:
            yield from ((f"{name}.{key}", node, slot_class(name)) for key, node in getattr(experiment, name).items())
        else:
            yield name, getattr(experiment, name), slot_class(name)


def under(path: str) -> str:
    """What stands before a key of the node at ``path``; nothing where that is the whole."""
    return f"{path}." if path else ""


class _Checker:
    """The nodes of one experiment, against signatures and against what they may name."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust

    def slot(self, node: Any, kind: type, path: str) -> list[Problem]:
        """Problems of a node that must make a ``kind``, and of the nodes below it."""
        if not is_node(node):
            return [Problem(path, describe(node) if node else "nothing", describe_slot(kind)), *self.inside(node, path)]
        return self._value(node, kind, path) + self.inside(node, path)

    def inside(self, value: Any, path: str) -> list[Problem]:
        """Problems of the node at ``path``, or of the nodes below it."""
        if isinstance(value, list):
            return [p for i, item in enumerate(value) for p in self.inside(item, f"{path}[{i}]")]
        if not isinstance(value, Mapping):
            return []
        below = [p for key, item in value.items() if key != TARGET for p in self.inside(item, f"{under(path)}{key}")]
        if TARGET not in value:
            return below
        if not isinstance(value[TARGET], str):
            return [Problem(f"{under(path)}{TARGET}", describe(value[TARGET]), "the dotted path of a class or classmethod"), *below]
        return self._target(value, path) + below

    def _target(self, node: Mapping[str, Any], path: str) -> list[Problem]:
        where, name, in_trainer = f"{under(path)}{TARGET}", str(node[TARGET]), path.startswith(("trainer.", "loggers."))
        if refusal := self.trust.refusal(name):
            return [replace(refusal, where=where)]
        try:
            target = find_target(name)
        except UserError as error:
            error.locate(place=where)
            if moved := where_now(name):
                return [Moved(wrong.where, wrong.found, wrong.expected, moved) for wrong in error.problems]
            gone = GONE.get(name, "")
            return [replace(wrong, hint=gone or wrong.hint) for wrong in error.problems]
        if refusal := self.trust.refusal(name, target, in_trainer):
            return [replace(refusal, where=where)]
        return self.arguments(target, node, path)

    def arguments(self, target: Target, node: Mapping[str, Any], path: str) -> list[Problem]:
        problems = self.trust.passed_on(node, path)
        name = class_name(target.call) if inspect.isclass(target.call) else str(node[TARGET])
        below = under(path)
        known, misspelt = list(target.hints), set()
        for key, value in node.items():
            if key == TARGET:
                continue
            if key in target.hints:
                problems += self._value(value, target.hints[key], f"{below}{key}")
            elif target.open:
                problems += self.trust.loose(value, f"{below}{key}")
            else:
                if moved := where_now(f"{below}{key}"):
                    problems.append(Moved(f"{below}{key}", f"an unknown argument '{key}'", "", moved))
                    continue
                meant = nearest(str(key), known)
                misspelt.add(meant)
                short = meant is not None and len(known) > 12
                expected = f"{len(known)} others" if short else ", ".join(known) or "none"
                found = f"an unknown argument '{key}'"
                problems.append(Problem(f"{below}{key}", found, f"the arguments of {name}: {expected}", did_you_mean(meant)))
        for key in target.required:
            if key not in node and key not in misspelt:
                problems.append(Problem(f"{below}{key}", "nothing", f"{describe_slot(target.hints[key])} ({name} needs it)"))
        return problems

    def _value(self, value: Any, hint: Any, where: str) -> list[Problem]:
        return mismatches(value, hint, where, self.trust.class_of, self.trust.loose)

    def trainer(self, trainer: Mapping[str, Any]) -> list[Problem]:
        from lightning import Trainer

        target = find_target("lightning.Trainer")
        known = {key: hint for key, hint in target.hints.items() if key not in RESERVED}
        problems = []
        for key, instead in RESERVED.items():
            if key in trainer:
                problems.append(Problem(f"trainer.{key}", f"'{key}', which the command sets", instead))
        rest = {key: value for key, value in trainer.items() if key not in RESERVED}
        open_ended = Target(Trainer, Trainer, known, (), False)
        problems += self.arguments(open_ended, {TARGET: "lightning.Trainer", **rest}, "trainer")
        problems += [p for key, value in rest.items() for p in self.inside(value, f"trainer.{key}")]
        if not {"max_steps", "max_epochs"} & set(rest):
            problems.append(Problem("trainer.max_steps", "nothing", "a whole number (the training loader never ends)"))
        for key, (harmless, instead) in _NOTHING.items():
            if rest.get(key) not in harmless:
                problems.append(Problem(f"trainer.{key}", f"{rest[key]}, which does not fit a run", instead))
        return problems
