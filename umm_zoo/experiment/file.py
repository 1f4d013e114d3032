"""The experiment file: a typed envelope, inheritance with ``base:``, overrides from the command line, interpolation.

Nothing here imports torch, so that ``--help`` and mistakes in the envelope answer at once. What stands inside ``method``, ``data``,
``callbacks``, ``metrics`` and ``trainer`` is checked by ``check.py`` against the signatures of the classes it names.

Layers, each over the one before: the files of ``base`` in order, the file itself, the ``key=value`` pairs of the command line.
Maps merge key by key; a node whose ``_target_`` changes is replaced whole; lists and plain values are replaced. ``null`` removes an
entry of ``callbacks``, ``metrics`` and every other map of named objects; as an argument it is Python's None. ``name`` is the only
key that is not inherited: it defaults to the file's own stem, so that a child never writes into the run folder of its base.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

from umm_zoo.errors import Problem, UserError, did_you_mean, nearest
from umm_zoo.experiment.types import TARGET, describe, mismatches

#: Maps from a free name to a node; ``null`` removes an entry.
NAMED = ("callbacks", "metrics")
#: Trainer arguments that say where a run takes place; its scores do not depend on them.
PLACES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")


#: Fields of an experiment that say where it comes from.
_ASIDE = ("file", "folders", "overrides")


@dataclass
class Experiment:
    """A resolved experiment: plain values only, every interpolation filled in.

    Args:
        name: run folder below ``runs/``; letters, digits, ``.``, ``_``, ``-`` and ``/``.
        seed: seeds the weights, and with the rank added the noise of training.
        vars: free values for interpolation, ``${vars.steps}``.
        method: node of a ``umm_zoo.method.Method``.
        training: which parts are trained, and how: arguments of ``umm_zoo.training.setup.TrainingSetup``.
        data: node of a ``LightningDataModule``.
        callbacks: name -> node of a Lightning callback; ``checkpoint`` and ``progress`` replace the built-in ones.
        metrics: name -> node of a torchmetrics metric, scored at every validation.
        trainer: arguments of ``lightning.Trainer``.
        after: the experiment file, run folder or checkpoint whose trained weights are the start.
        file: where it was read from; not part of the experiment itself.
        folders: directories that its dotted paths may be found in, beside the installed packages; not part of it either.
        overrides: what the command line has changed; filled in above, and not part of it either.
    """

    name: str = ""
    seed: int = 0
    vars: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    file: str = ""
    folders: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    def resolved(self) -> dict[str, Any]:
        """The experiment as a plain dict, as it is written to ``experiment.yaml`` and into every checkpoint."""
        return {key: value for key, value in asdict(self).items() if key not in _ASIDE}

    def to_yaml(self) -> str:
        """The resolved experiment as text that ``load_experiment`` reads back."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=120)

    def use_folders(self) -> None:
        """Let dotted paths find modules that lie beside the experiment file and in the current directory."""
        use_folders([os.getcwd(), *self.folders])


#: Keys of an experiment file.
ENVELOPE = (*(f.name for f in fields(Experiment) if f.name not in _ASIDE), "base")
_MAPS = ("vars", "method", "training", "data", "callbacks", "metrics", "trainer")


def use_folders(folders: Iterable[str]) -> None:
    """Append directories to the import path (appended, so that nobody's ``random.py`` hides Python's)."""
    for folder in folders:
        if os.path.isdir(folder) and folder not in sys.path:
            sys.path.append(folder)


def load_experiment(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file with its bases, apply ``key=value`` overrides, fill in interpolations.

    Raises:
        UserError: every mistake that can be seen without importing the classes it names.
    """
    tree, folders = _read_with_bases(Path(file), ())
    tree.setdefault("name", Path(file).stem)
    return experiment_from(tree, file, folders, overrides)


def load_stage(file: str | Path, overrides: Sequence[str]) -> Experiment:
    """An earlier stage of a curriculum, with those overrides of the later one that mean the whole of it.

    They are ``vars.*`` (of the names that this stage has), ``seed``, and where it runs (``PLACES``). The others are the later
    stage's own.

    Raises:
        UserError: see ``load_experiment``.
    """
    tree, folders = _read_with_bases(Path(file), ())
    tree.setdefault("name", Path(file).stem)
    known = tree.get("vars")
    names = [f"vars.{name}" for name in known] if isinstance(known, Mapping) else []
    reach = tuple(f"{key}{end}" for key in ("seed", *PLACES, *names) for end in "=.")
    return experiment_from(tree, file, folders, [text for text in overrides if text.startswith(reach)])


def experiment_from(
    tree: Mapping[str, Any], file: str | Path, folders: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Experiment:
    """An experiment from an unresolved (or stored) dict; see ``load_experiment``."""
    tree = {"seed": 0, **tree}  # so that ${seed} leads somewhere in a file that does not state it
    for override in overrides:
        tree = _override(tree, override, file)
    resolved = _interpolate(tree, file)
    problems = list(_envelope_problems(resolved))
    if problems:
        raise UserError(file, problems)
    for key in _MAPS:
        resolved[key] = resolved.get(key) or {}
    for key in NAMED:
        resolved[key] = {name: node for name, node in resolved[key].items() if node is not None}
    return Experiment(**resolved, file=str(file), folders=list(folders), overrides=list(overrides))


# -- files -------------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    if file.is_dir():
        raise UserError(file, "a folder", "an experiment file")
    if not file.is_file():
        raise UserError(
            file, "no such file", "an experiment file", did_you_mean(file.name, (p.name for p in file.parent.glob("*.y*ml")))
        )
    try:
        tree = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")), resolve=False)
    except GrammarParseError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            file, f"{error.full_key}: found an interpolation that cannot be read ({reason}), expected ${{key}}"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(file, f"found text that is not YAML{line} ({reason}), expected an experiment file") from None
    if not isinstance(tree, dict):
        raise UserError(file, f"found a {type(tree).__name__}, expected a map with the keys {', '.join(ENVELOPE)}")
    problems = [_unknown(str(key), ENVELOPE) for key in tree if key not in ENVELOPE]
    if problems:
        raise UserError(file, problems)
    return {str(key): value for key, value in tree.items()}


def _unknown(key: str, known: Iterable[str], where: str = "") -> Problem:
    known = list(known)
    path = f"{where}.{key}" if where else key
    return Problem(path, f"an unknown key '{key}'", f"{', '.join(map(str, known)) or 'none'}", did_you_mean(key, known))


def _read_with_bases(file: Path, below: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """The merged tree of a file and its bases, and the folders they lie in (the file's own first)."""
    if file.resolve() in below:
        circle = [*below[below.index(file.resolve()) :], file.resolve()]
        raise UserError(below[-1], f"base: found a circle {' -> '.join(p.name for p in circle)}, expected files that end somewhere")
    own = _read(file)
    stated = own.pop("base", None)
    bases = [stated] if isinstance(stated, str) else (stated or [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(file, [Problem("base", repr(stated), "a path relative to this file, or a list of such paths")])
    merged: dict[str, Any] = {}
    folders = [str(file.resolve().parent)]
    for base in bases:
        path = file.parent / base
        if not path.is_file():
            near = nearest(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else None
            raise UserError(
                file, [Problem("base", f"'{base}', which is no file", f"a path relative to {file.parent}/", did_you_mean(near))]
            )
        tree, more = _read_with_bases(path, (*below, file.resolve()))
        tree.pop("name", None)
        merged = merge(merged, tree)
        folders += [folder for folder in more if folder not in folders]
    if isinstance(own.get("after"), str):
        own["after"] = _portable(file.parent / own["after"])
    return merge(merged, own), folders


def _portable(path: Path) -> str:
    """Relative to the current directory where the path lies below it, so that a run folder may move with its project."""
    path = path.resolve()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else str(path)


def merge(old: Any, new: Any) -> Any:
    """One layer over another: maps merge, a node of another class replaces, everything else replaces."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if TARGET in new and new[TARGET] != old.get(TARGET) and (TARGET in old or new[TARGET] is not None):
        return dict(new)
    return {**old, **{key: merge(old[key], value) if key in old else value for key, value in new.items()}}


# -- the command line --------------------------------------------------------------------------------------------------------


def parse_override(text: str, file: str | Path = "command line") -> tuple[str, Any]:
    """``trainer.max_steps=200`` as a dotted path and a value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        expected = "key=value with a dotted key such as trainer.max_steps=200"
        raise UserError(file, f"found '{text}' on the command line, expected {expected}")
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(file, f"{key}: found '{value}' on the command line, expected a YAML value ({reason})") from None


def _override(tree: dict[str, Any], text: str, file: str | Path) -> dict[str, Any]:
    """Apply one override. Arguments a node does not state yet may be added (the signature is checked later); names may not."""
    key, value = parse_override(text, file)
    path = key.split(".")
    top = path[0]
    settable = [name for name in ENVELOPE if name != "base"] + ["ckpt"]
    if top not in settable[:-1]:
        raise UserError(file, [_unknown(top, settable)])
    if top == "after" and isinstance(value, str):
        value = _portable(Path(value))
    here: Any = tree
    for depth, part in enumerate(path):
        where = ".".join(path[:depth])
        if isinstance(here, list):
            raise UserError(file, f"{key}: found the element '{part}' of a list at {where}, expected the whole list, {where}=[…]")
        if not isinstance(here, Mapping):
            break  # a plain value where the override expects a map: it is replaced, and the checker judges the result
        named = depth == 1 and top in ("vars", *NAMED)
        adds = top in NAMED and depth == len(path) - 1 and isinstance(value, Mapping) and TARGET in value
        if named and part not in here and not adds and path[2:] != [TARGET]:
            raise UserError(file, [_unknown(part, here, where)])
        here = here.get(part)
    for part in reversed(path):
        value = {part: value}
    merged: dict[str, Any] = merge(tree, value)
    return merged


# -- interpolation and the envelope's types ------------------------------------------------------------------------------------


def _interpolate(tree: dict[str, Any], file: str | Path) -> dict[str, Any]:
    try:
        config = OmegaConf.create(tree)
    except OmegaConfBaseException as error:
        raise UserError(
            file, f"{error.full_key}: found an interpolation that cannot be read ({str(error).splitlines()[0]}), expected ${{key}}"
        ) from None
    problems = list(_unresolved(config, "", list(_paths(tree))))
    if problems:
        raise UserError(file, problems)
    container: Any = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in container.items()}


def _paths(tree: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")


def _unresolved(config: Any, where: str, known: list[str]) -> Iterable[Problem]:
    keys: Iterable[Any] = range(len(config)) if isinstance(config, ListConfig) else list(config)
    for key in keys:
        path = f"{where}[{key}]" if isinstance(config, ListConfig) else f"{where}.{key}" if where else str(key)
        try:
            value = config[key]
        except MissingMandatoryValue:
            yield Problem(path, "??? (still to be given)", f"a value, for instance on the command line as {path}=…")
        except (OmegaConfBaseException, RecursionError) as error:
            raw = OmegaConf.to_container(config, resolve=False)[key]  # type: ignore[index]
            wanted = re.search(r"Interpolation key '([^']*)' not found", str(error))
            reason = "" if wanted else f" ({(str(error).splitlines() or ['?'])[0]})"
            meant = did_you_mean(nearest(wanted[1], known)) if wanted else ""
            yield Problem(path, f"'{raw}', which leads to nothing{reason}", "an interpolation of a key of this experiment", meant)
        else:
            if isinstance(value, (DictConfig, ListConfig)):
                yield from _unresolved(value, path, known)


def _envelope_problems(tree: Mapping[str, Any]) -> Iterable[Problem]:
    problems: list[Problem] = [_unknown(key, ENVELOPE) for key in tree if key not in ENVELOPE]
    for key in _MAPS:
        value = tree.get(key)
        if value is not None and not isinstance(value, Mapping):
            problems.append(Problem(key, describe(value), "a map" + (" from names to nodes" if key in NAMED else "")))
    problems += mismatches(tree.get("name", ""), str, "name") + mismatches(tree.get("seed", 0), int, "seed")
    problems += mismatches(tree.get("after"), str | None, "after")
    name = tree.get("name")
    if isinstance(name, str) and (not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*", name) or ".." in name.split("/")):
        problems.append(Problem("name", f"'{name}'", "letters, digits, '.', '_', '-' and '/' (it names the run folder)"))
    return problems
