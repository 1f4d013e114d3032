"""The layers of an experiment: one map over another, and the ``key=value`` pairs of the command line over all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from umm_zoo.errors import Problem, UserError, did_you_mean
from umm_zoo.experiment.types import TARGET

#: Maps from a free name to a node; ``null`` removes an entry.
NAMED = ("callbacks", "metrics")


def merge(old: Any, new: Any) -> Any:
    """One layer over another: maps merge, a node of another class replaces, everything else replaces."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if TARGET in new and new[TARGET] != old.get(TARGET) and (TARGET in old or new[TARGET] is not None):
        return dict(new)
    return {**old, **{key: merge(old[key], value) if key in old else value for key, value in new.items()}}


def parse_override(text: str, file: str | Path = "command line") -> tuple[str, Any]:
    """``trainer.max_steps=200`` as a dotted path and a value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        raise UserError(file, f"'{text}' on the command line", "key=value with a dotted key such as trainer.max_steps=200")
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(key, f"'{value}' on the command line", f"a YAML value ({reason})", file=file) from None


def overridden(tree: dict[str, Any], text: str, file: str | Path, envelope: Sequence[str]) -> dict[str, Any]:
    """A tree with one override of the command line.

    Arguments that a node does not state yet may be added (the signature is checked later); names may not.

    Args:
        tree: with the keys of the envelope.
        text: ``key=value``.
        file: for messages.
        envelope: keys of an experiment file.

    Raises:
        UserError: it is no such pair, or sets what is not there.
    """
    key, value = parse_override(text, file)
    path = key.split(".")
    top = path[0]
    settable = [name for name in envelope if name != "base"]
    if top not in settable:
        raise UserError(file, [unknown(top, [*settable, "ckpt"])])
    if top == "after" and isinstance(value, str):
        value = portable(Path(value))
    here: Any = tree
    for depth, part in enumerate(path):
        where = ".".join(path[:depth])
        if isinstance(here, list):
            raise UserError(key, f"the element '{part}' of a list at {where}", f"the whole list, {where}=[…]", file=file)
        if not isinstance(here, Mapping):
            break  # a plain value where the override expects a map: it is replaced, and the checker judges the result
        named = depth == 1 and top in ("vars", *NAMED)
        adds = top in NAMED and depth == len(path) - 1 and isinstance(value, Mapping) and TARGET in value
        if named and part not in here and not adds and path[2:] != [TARGET]:
            raise UserError(file, [unknown(part, here, where)])
        here = here.get(part)
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
