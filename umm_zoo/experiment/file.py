"""The experiment file: a typed envelope, inheritance with ``base:``, overrides from the command line, interpolation.

Nothing here imports torch, so that ``--help`` and errors of the envelope answer at once. What stands inside ``method``,
``adapters``, ``data``, ``callbacks``, ``metrics``, ``loggers`` and ``trainer`` is checked by ``check.py`` against the signatures
of the classes it names.

Layers, each over the one before: the files of ``base`` in order, the file itself, the ``key=value`` pairs of the command line.
Maps merge key by key; a node whose ``_target_`` changes is replaced whole; lists and plain values are replaced. ``null`` removes an
entry of ``adapters``, ``callbacks``, ``metrics``, ``loggers`` and every other map of named objects; as an argument it is Python's
None. ``name`` is the only key that is not inherited: it defaults to the file's own stem, so that a child never writes into the run
folder of its base.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from umm_zoo.errors import Problem, UserError, several
from umm_zoo.experiment.interpolation import interpolated
from umm_zoo.experiment.layers import NAMED, overridden, read_layers, unknown
from umm_zoo.experiment.limits import envelope_limits
from umm_zoo.experiment.plain_yaml import yaml_text
from umm_zoo.experiment.shipped import located
from umm_zoo.experiment.trust import Trust, secrets, users_modules
from umm_zoo.experiment.types import describe, mismatches

#: Trainer arguments that say where a run takes place; its scores do not depend on them.
PLACES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")

#: Fields of an experiment that say where it comes from.
_ASIDE = ("file", "folders", "overrides", "trusted", "stored")


@dataclass
class Experiment:
    """A resolved experiment: plain values only, every interpolation filled in.

    Args:
        name: run folder below ``runs/``; letters, digits, ``.``, ``_``, ``-`` and ``/``.
        seed: seeds the weights, and with the rank added the noise of training.
        vars: free values for interpolation, ``${vars.steps}``.
        method: node of a ``umm_zoo.method.Method``.
        adapters: name of a part -> node of a ``umm_zoo.backbones.adapters.LoRA`` that stands in it, as the part ``<part>_adapter``.
        training: which parts are trained, and how: arguments of ``umm_zoo.training.setup.TrainingSetup``.
        data: node of a ``LightningDataModule``.
        callbacks: name -> node of a Lightning callback; ``checkpoint`` and ``progress`` replace the built-in ones.
        metrics: name -> node of a torchmetrics metric, scored at every validation.
        loggers: name -> node of a Lightning logger, beside ``logs/metrics.csv`` and TensorBoard's.
        trainer: arguments of ``lightning.Trainer``.
        after: the experiment file, run folder or checkpoint whose trained weights are the start.
        file: where it was read from; not part of the experiment itself.
        folders: directories that its dotted paths may be found in, beside the installed packages; not part of it either.
        overrides: what the command line has changed; filled in above, and not part of it either.
        trusted: None for an experiment file; of one out of weights, the modules that the user allows it to name.
        stored: keys of the envelope that the environment has filled in (``${oc.env:TOKEN}``), as they are written down: unfilled.
    """

    name: str = ""
    seed: int = 0
    vars: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    file: str = ""
    folders: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    trusted: list[str] | None = None
    stored: dict[str, Any] = field(default_factory=dict)

    @property
    def trust(self) -> Trust:
        """What its nodes may name."""
        return Trust(self.trusted is not None, tuple(self.trusted or ()))

    @property
    def named_modules(self) -> list[str]:
        """Modules of the user's that weights which are loaded on the way may name too."""
        return sorted(users_modules(self.resolved())) if self.trusted is None else self.trusted

    @property
    def method_tree(self) -> dict[str, Any]:
        """What the method is made of, for ``build_method``."""
        return {"method": self.method, "adapters": self.adapters}

    def resolved(self) -> dict[str, Any]:
        """The experiment as a plain dict, as it is written to ``experiment.yaml`` and into every checkpoint."""
        return {key: self.stored.get(key, value) for key, value in asdict(self).items() if key not in _ASIDE}

    def to_yaml(self) -> str:
        """The resolved experiment as text that ``load_experiment`` reads back."""
        return yaml_text(self.resolved(), sort_keys=False, allow_unicode=True, width=120)


#: Keys of an experiment file.
ENVELOPE = (*(f.name for f in fields(Experiment) if f.name not in _ASIDE), "base")
_MAPS = ("vars", "method", "adapters", "training", "data", "callbacks", "metrics", "loggers", "trainer")


def use_folders(folders: Iterable[str]) -> None:
    """Append directories, and ``src`` in each, to the import path (appended, so that nobody's ``random.py`` hides Python's)."""
    for folder in (place for own in folders for place in (own, os.path.join(own, "src"))):
        if os.path.isdir(folder) and folder not in sys.path:
            sys.path.append(folder)


def load_experiment(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file with its bases, apply ``key=value`` overrides, fill in interpolations.

    Args:
        file: a path, or the name of one that ships (``umm_zoo:llava/shapes.yaml``).
        overrides: of the command line.

    Raises:
        UserError: everything wrong that can be seen without importing the classes it names.
    """
    file = located(file)
    tree, folders = read_layers(file, ENVELOPE, overrides)
    return experiment_from(tree, file, folders, overrides)


def _load_stage(file: str | Path, overrides: Sequence[str]) -> Experiment:
    """An earlier stage of a curriculum, with those overrides of the later one that mean the whole of it.

    They are ``vars.*`` (of the names that this stage has), ``seed``, and where it runs (``PLACES``). The others are the later
    stage's own.
    """
    tree, folders = read_layers(Path(file), ENVELOPE, overrides)
    known = tree.get("vars")
    names = [f"vars.{name}" for name in known] if isinstance(known, Mapping) else []
    reach = tuple(f"{key}{end}" for key in ("seed", *PLACES, *names) for end in "=.")
    return experiment_from(tree, file, folders, [text for text in overrides if text.startswith(reach)])


def earlier_stages(experiment: Experiment, planned: bool = False) -> list[Experiment]:
    """The experiments that ``after`` names, nearest first; empty where it names a run folder or a checkpoint.

    The command line's ``vars.*``, ``seed`` and place (accelerator, devices, nodes, strategy) hold for them too. Where it is only
    ``planned``, the run or checkpoint that they start from may be still to come.

    Raises:
        UserError: ``after`` leads nowhere, in a circle, or to a stage of the same name.
    """
    line = [experiment]
    while line[-1].after:
        path = Path(line[-1].after)
        is_stage = path.suffix in (".yaml", ".yml")
        if not path.exists() and (is_stage or not planned):
            expected = "an experiment file, a run folder or a checkpoint"
            raise UserError("after", f"'{path}', which does not exist", expected, file=line[-1].file)
        if not is_stage:
            break
        stage = _load_stage(path, line[-1].overrides)
        if stage.name in [other.name for other in line]:
            circle = " -> ".join(f"{Path(other.file).name} (name {other.name})" for other in [*line, stage])
            raise UserError("after", f"a circle {circle}", "stages with different names that end somewhere", file=line[-1].file)
        line.append(stage)
    return line[1:]


def experiment_from(
    tree: Mapping[str, Any],
    file: str | Path,
    folders: Sequence[str] = (),
    overrides: Sequence[str] = (),
    trusted: Sequence[str] | None = None,
) -> Experiment:
    """An experiment from an unresolved (or stored) dict; see ``load_experiment``, and ``Experiment`` for ``trusted``."""
    several("folders", folders)
    several("overrides", overrides)
    use_folders([os.getcwd(), *folders])  # dotted paths find what lies beside the files and in the current directory
    tree = {"seed": 0, **tree}  # so that ${seed} leads somewhere in a file that does not state it
    trust = Trust(trusted is not None, tuple(trusted or ()))
    for override in overrides:
        tree = overridden(tree, override, file, ENVELOPE, trust)
    given = [text.partition("=")[0] for text in overrides]
    resolved = interpolated(tree, file) if trusted is None else interpolated_embedded(tree, file, given)
    if problems := _envelope_problems(resolved):
        raise UserError(file, problems)
    for key in _MAPS:
        resolved[key] = resolved.get(key) or {}
    for key in NAMED:
        resolved[key] = {name: node for name, node in resolved[key].items() if node is not None}
    experiment = Experiment(**resolved, file=str(file), folders=list(folders), overrides=list(overrides))
    experiment.trusted = None if trusted is None else list(trusted)
    if "oc.env" in repr(tree):
        unfilled = interpolated(tree, file, environment=False)
        experiment.stored = {key: unfilled[key] for key in unfilled if unfilled[key] and unfilled[key] != getattr(experiment, key)}
    return experiment


def interpolated_embedded(tree: dict[str, Any], source: str | Path, given: Sequence[str] = ()) -> dict[str, Any]:
    """What weights hold of an experiment, with everything filled in, where that takes no secret of the environment elsewhere.

    Args:
        tree: some of its keys.
        source: the weights, for messages.
        given: dotted keys that the user has given himself.

    Raises:
        UserError: names every value that might, and every interpolation that leads to nothing.
    """
    if "oc." in repr(tree) and (problems := list(secrets(interpolated(tree, source, environment=False), given))):
        raise UserError(source, problems)
    return interpolated(tree, source)


def _envelope_problems(tree: Mapping[str, Any]) -> list[Problem]:
    known = [key for key in ENVELOPE if key != "base"]  # of a file it has been followed
    problems = [unknown(key, known) for key in tree if key not in known]
    for key in _MAPS:
        value = tree.get(key)
        if value is not None and not isinstance(value, Mapping):
            problems.append(Problem(key, describe(value), "a map" + (" from names to nodes" if key in NAMED else "")))
    problems += mismatches(tree.get("name", ""), str, "name") + mismatches(tree.get("seed", 0), int, "seed")
    problems += mismatches(tree.get("after"), str | None, "after") + list(envelope_limits(tree))
    name = tree.get("name")
    if isinstance(name, str) and (not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*", name) or {".", ".."} & set(name.split("/"))):
        problems.append(Problem("name", f"'{name}'", "letters, digits, '.', '_', '-' and '/' (it names the run folder)"))
    elif isinstance(name, str) and any(len(part.encode()) > 255 for part in name.split("/")):
        problems.append(Problem("name", f"{len(name)} letters", "at most 255 for a folder (it names the run folder)"))
    return problems
