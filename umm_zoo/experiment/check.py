"""Check of a whole experiment against signatures and type hints; every problem is collected before anything is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from umm_zoo.errors import Problem, UserError, did_you_mean, nearest
from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.moved import GONE, Moved, where_now
from umm_zoo.experiment.targets import Target, class_of, find_target
from umm_zoo.experiment.types import TARGET, class_name, describe, describe_slot, is_node, mismatches

#: Class whose arguments the map ``training`` holds.
TRAINING = "umm_zoo.training.setup.TrainingSetup"
#: What the commands give to the trainer themselves, and where an experiment file says it instead.
RESERVED = {"callbacks": "the map 'callbacks' of the experiment", "default_root_dir": "the option --runs of the command"}


def check(experiment: Experiment) -> None:
    """Check every node, argument and value of an experiment; nothing is built.

    Raises:
        UserError: with every problem found.
    """
    importlib.invalidate_caches()
    problems: list[Problem] = []
    for path, node, kind in slots_of(experiment):
        if not is_node(node):
            problems.append(Problem(path, describe(node) if node else "nothing", describe_slot(kind)))
        else:
            problems += mismatches(node, kind, path, class_of)
        problems += _inside(node, path)
    problems += _inside({TARGET: TRAINING, **experiment.training}, "training")
    problems += _trainer_problems(experiment.trainer)
    if moved := [problem for problem in problems if isinstance(problem, Moved)]:
        found = f"{len(moved)} keys or classes of an earlier version, such as {moved[0].where} ({moved[0].hint})"
        raise UserError(experiment.file, found, "those of this one", "python tools/migrate_experiment.py FILE rewrites a file")
    if problems:
        raise UserError(experiment.file, problems)


def slots_of(experiment: Experiment) -> Iterable[tuple[str, Any, type]]:
    """(path, node, class it must be) of the envelope's own slots."""
    from lightning import Callback, LightningDataModule
    from torchmetrics import Metric

    yield "method", experiment.method, importlib.import_module("umm_zoo.method").Method  # by name: methods know this package
    yield "data", experiment.data, LightningDataModule
    for name, node in experiment.callbacks.items():
        yield f"callbacks.{name}", node, Callback
    for name, node in experiment.metrics.items():
        yield f"metrics.{name}", node, Metric


def _inside(value: Any, path: str) -> list[Problem]:
    """Problems of the node at ``path``, or of the nodes below it."""
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in _inside(item, f"{path}[{i}]")]
    if not isinstance(value, Mapping):
        return []
    below = [p for key, item in value.items() if key != TARGET for p in _inside(item, f"{path}.{key}")]
    if TARGET not in value:
        return below
    if not isinstance(value[TARGET], str):
        return [Problem(f"{path}.{TARGET}", describe(value[TARGET]), "the dotted path of a class or classmethod"), *below]
    try:
        target = find_target(value[TARGET])
    except UserError as error:
        error.locate(place=f"{path}.{TARGET}")
        if moved := where_now(value[TARGET]):
            return [Moved(wrong.where, wrong.found, wrong.expected, moved) for wrong in error.problems] + below
        if gone := GONE.get(value[TARGET]):
            return [Problem(wrong.where, wrong.found, wrong.expected, gone) for wrong in error.problems] + below
        return error.problems + below
    return _argument_problems(target, value, path) + below


def _argument_problems(target: Target, node: Mapping[str, Any], path: str) -> list[Problem]:
    problems = []
    name = class_name(target.call) if inspect.isclass(target.call) else str(node[TARGET])
    known, misspelt = list(target.hints), set()
    for key, value in node.items():
        if key == TARGET:
            continue
        if key in target.hints:
            problems += mismatches(value, target.hints[key], f"{path}.{key}", class_of)
        elif not target.open:
            if moved := where_now(f"{path}.{key}"):
                problems.append(Moved(f"{path}.{key}", f"an unknown argument '{key}'", "", moved))
                continue
            meant = nearest(str(key), known)
            misspelt.add(meant)
            short = meant is not None and len(known) > 12
            expected = f"{len(known)} others" if short else ", ".join(known) or "none"
            found = f"an unknown argument '{key}'"
            problems.append(Problem(f"{path}.{key}", found, f"the arguments of {name}: {expected}", did_you_mean(meant)))
    for key in target.required:
        if key not in node and key not in misspelt:
            problems.append(Problem(f"{path}.{key}", "nothing", f"{describe_slot(target.hints[key])} ({name} needs it)"))
    return problems


def _trainer_problems(trainer: Mapping[str, Any]) -> list[Problem]:
    from lightning import Trainer

    target = find_target("lightning.Trainer")
    known = {key: hint for key, hint in target.hints.items() if key not in RESERVED}
    problems = []
    for key, instead in RESERVED.items():
        if key in trainer:
            problems.append(Problem(f"trainer.{key}", f"'{key}', which the command sets", instead))
    rest = {key: value for key, value in trainer.items() if key not in RESERVED}
    open_ended = Target(Trainer, Trainer, known, (), False)
    problems += _argument_problems(open_ended, {TARGET: "lightning.Trainer", **rest}, "trainer")
    problems += [p for key, value in rest.items() for p in _inside(value, f"trainer.{key}")]
    if not {"max_steps", "max_epochs", "max_time", "fast_dev_run"} & set(rest):
        problems.append(Problem("trainer.max_steps", "nothing", "a whole number (the training loader never ends)"))
    return problems
