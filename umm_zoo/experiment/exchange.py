"""A node of the command line in the place of one of another class: which arguments stay, and which fall away."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from umm_zoo.errors import UserError, note
from umm_zoo.experiment.targets import find_target
from umm_zoo.experiment.trust import Trust
from umm_zoo.experiment.types import TARGET

_note_once = cache(note)  # a comparison reads an experiment once per seed


def exchanged(old: Any, new: Any, path: list[str], trust: Trust) -> Any:
    """The value of an override, with the arguments of the node before it that its class takes too, where it says a class alone.

    What falls away with the former class is said: by ``method.block._target_=b.Other`` what the class does not take, by
    ``method.block={_target_: b.Other, …}``, which is the whole node, what it does not state.

    Args:
        old: what stands there: the class of a node, or a node.
        new: the value.
        path: of the node.
        trust: says which classes may be looked at.
    """
    if not isinstance(old, Mapping) or not isinstance(old.get(TARGET), str) or not isinstance(new, Mapping):
        return new
    if not isinstance(kind := new.get(TARGET), str) or kind == old[TARGET]:
        return new
    arguments = {key: value for key, value in old.items() if key != TARGET}
    kept = {key: value for key, value in arguments.items() if _takes(kind, key, trust)} if len(new) == 1 else {}
    if lost := [key for key in arguments if key not in kept and key not in new]:
        one, other = (name.rpartition(".")[2] for name in (kind, old[TARGET]))
        _note_once(f"{'.'.join(path)}: {one} in the place of {other}; what falls away: {', '.join(lost)}")
    return {**new, **kept}


def _takes(path: str, argument: str, trust: Trust) -> bool:
    """Whether the class at a dotted path takes an argument; no where it cannot be found, which the check says."""
    if not trust.may_import(path):
        return False
    try:
        target = find_target(path)
    except UserError:
        return False
    return target.open or argument in target.hints
