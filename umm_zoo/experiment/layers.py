"""The layers of an experiment: the files of ``base``, the file itself, and the ``key=value`` pairs of the command line over all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from umm_zoo.errors import Problem, UserError, did_you_mean, locating
from umm_zoo.experiment.exchange import exchanged
from umm_zoo.experiment.interpolation import unreadable
from umm_zoo.experiment.limits import MAX_DEPTH, check_depth
from umm_zoo.experiment.shipped import located
from umm_zoo.experiment.trust import Trust
from umm_zoo.experiment.types import TARGET

#: Maps from a free name to a node; ``null`` removes an entry.
NAMED = ("adapters", "callbacks", "metrics", "loggers")


def read_layers(
    file: Path, envelope: Sequence[str], overrides: Sequence[str] = (), below: tuple[Path, ...] = (), above: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """The merged tree of a file and its bases, and the folders they lie in (the file's own first).

    A path in ``base`` may hold ``${vars.x}``: by the command line's value of it, else that of the outermost layer so far.

    Args:
        file: YAML; without a name it takes that of the file.
        envelope: keys of an experiment file.
        overrides: of the command line; those of ``vars`` are looked at, none is applied.
        below: files that have this one for a base.
        above: the ``vars`` that those files state.

    Raises:
        UserError: a file is missing, unreadable or its own base, or has a key that there is not.
    """
    if file.resolve() in below:
        circle = " -> ".join(path.name for path in [*below[below.index(file.resolve()) :], file])
        raise UserError("base", f"a circle {circle}", "files that end somewhere", file=below[-1])
    own = {"name": file.stem} | read_map(file, envelope)
    stated = own.pop("base", None)
    bases = [stated] if isinstance(stated, str) else (stated or [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError("base", repr(stated), "a path relative to this file, or a list of such paths", file=file)
    merged: dict[str, Any] = {}
    folders = [str(file.resolve().parent)]
    stated_vars = merge(own.get("vars") or {}, above or {})
    for base in bases:
        with locating(place="base", file=str(file)):
            path = located(_filled(base, stated_vars, overrides, file), file.parent)
        if not path.is_file():
            expected = f"a path relative to {file.parent}/"
            raise UserError(
                "base", f"'{os.path.relpath(path, file.parent)}', which is no file", expected, _neighbour(path), file=file
            )
        tree, more = read_layers(path, envelope, overrides, (*below, file.resolve()), stated_vars)
        merged = merge(merged, tree)
        folders += [folder for folder in more if folder not in folders]
    if isinstance(own.get("after"), str):
        with locating(place="after", file=str(file)):
            own["after"] = portable(located(own["after"], file.parent))
    return merge(merged, own), folders


def _filled(base: str, stated: Any, overrides: Sequence[str], file: Path) -> str:
    """A path of ``base`` with its ``${vars.x}`` filled in."""
    given = dict(_parse(text, file) for text in overrides if text.startswith("vars."))

    def value(match: re.Match[str]) -> str:
        name = match[1]
        found = given.get(f"vars.{name}", stated.get(name) if isinstance(stated, Mapping) else None)
        if not isinstance(found, (str, int)) or "$" in str(found):
            raise UserError("base", f"'{base}', where vars.{name} is {found!r}", "a plain value of it in this file", file=file)
        return str(found)

    return re.sub(r"\$\{vars\.([\w\-]+)\}", value, base)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    """Bases are read for every experiment of a comparison; nobody changes what this returns."""
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def read_map(file: Path, known: Sequence[str], what: str = "an experiment file") -> dict[str, Any]:
    """The map in a YAML file, with its interpolations as they stand.

    Args:
        file: YAML.
        known: keys that the map may have.
        what: the kind of file, for messages.

    Raises:
        UserError: there is no such file, or something else in it.
    """
    if file.is_dir():
        raise UserError(file, "a folder", what)
    if not file.is_file():
        raise UserError(file, "no such file", what, _neighbour(file))
    try:
        text = file.read_text(encoding="utf-8")
        check_depth(text, str(file))
        tree = _parsed(text)
    except GrammarParseError as error:
        raise unreadable(error, file) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(file, f"text that is not YAML{line} ({reason})", what) from None
    if not isinstance(tree, dict):
        raise UserError(file, f"a {type(tree).__name__}", f"a map with the keys {', '.join(known)}")
    if problems := [unknown(str(key), known) for key in tree if key not in known]:
        raise UserError(file, problems)
    return {str(key): value for key, value in tree.items()}


def _neighbour(file: Path) -> str:
    """A hint at the file that was probably meant."""
    return did_you_mean(file.name, (path.name for path in file.parent.glob("*.y*ml")))


def merge(old: Any, new: Any) -> Any:
    """One layer over another: maps merge, a node of another class replaces, everything else replaces."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if TARGET in new and new[TARGET] != old.get(TARGET) and (TARGET in old or new[TARGET] is not None):
        return dict(new)
    return {**old, **{key: merge(old[key], value) if key in old else value for key, value in new.items()}}


def _parse(text: str, file: str | Path) -> tuple[str, Any]:
    """``trainer.max_steps=200`` as a dotted path and a value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        raise UserError(file, f"'{text}' on the command line", "key=value with a dotted key such as trainer.max_steps=200")
    check_depth(value, key)
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(key, f"'{value}' on the command line", f"a YAML value ({reason})", file=file) from None


def overridden(tree: dict[str, Any], text: str, file: str | Path, envelope: Sequence[str], trust: Trust) -> dict[str, Any]:
    """A tree with one override of the command line.

    Arguments that a node does not state yet may be added (the signature is checked later); names may not. A class alone
    (``data._target_=…``) keeps the arguments that it takes too, see ``exchanged``.

    Args:
        tree: with the keys of the envelope.
        text: ``key=value``.
        file: for messages.
        envelope: keys of an experiment file.
        trust: which classes may be looked at.

    Raises:
        UserError: it is no such pair, or sets what is not there.
    """
    key, value = _parse(text, file)
    path = key.split(".")
    top = path[0]
    if len(path) > MAX_DEPTH:
        raise UserError(file, [Problem(f"{key[:40]}…", f"a key of {len(path)} parts", f"at most {MAX_DEPTH}")])
    settable = [name for name in envelope if name != "base"]
    if top not in settable:
        raise UserError(file, [unknown(top, [*settable, "ckpt"])])
    if top == "after" and isinstance(value, str):
        value = portable(located(value))
    here: Any = tree
    if path[-1] == TARGET and len(path) > 1:
        path, value = path[:-1], {TARGET: value}
    for depth, part in enumerate(path):
        where = ".".join(path[:depth])
        if isinstance(here, list):
            raise UserError(key, f"the element '{part}' of a list at {where}", f"the whole list, {where}=[…]", file=file)
        if not isinstance(here, Mapping):
            break  # a plain value where the override expects a map: it is replaced, and the checker judges the result
        named = depth == 1 and top in ("vars", *NAMED)
        adds = top in NAMED and depth == len(path) - 1 and isinstance(value, Mapping) and TARGET in value
        if named and part not in here and not adds:
            raise UserError(file, [unknown(part, here, where)])
        here = here.get(part)
    else:
        value = exchanged(here, value, path, trust)
    for part in reversed(path):
        value = {part: value}
    merged: dict[str, Any] = merge(tree, value)
    return merged


def unknown(key: str, known: Iterable[str], where: str = "") -> Problem:
    """A key that is none of those known."""
    known = list(known)
    path = f"{where}.{key}" if where else key
    return Problem(path, f"an unknown key '{key}'", f"{', '.join(map(str, known)) or 'none'}", did_you_mean(key, known))


def portable(path: Path) -> str:
    """Relative to the current directory where the path lies below it, so that a run folder may move with its project."""
    path = path.resolve()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else str(path)
