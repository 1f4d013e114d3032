"""Does a value of an experiment file fit a slot: type hints against plain YAML values and nodes, without building anything."""

from __future__ import annotations

import collections.abc
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, is_typeddict

from umm_zoo.errors import Problem, did_you_mean
from umm_zoo.experiment.limits import outside

#: Key of a node that names its class.
TARGET = "_target_"

#: Gives the class that a node will make, or None where that is unknown (and has been reported already).
ClassOf = Callable[[Mapping[str, Any]], type | None]
#: Problems of a value in a slot that says of no class what belongs there.
Loose = Callable[[Any, str], list[Problem]]

_PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null", Path: "a path"}
#: What YAML gives where one of these is wanted.
_PLAIN_VALUES: dict[Any, Any] = {str: str, bool: bool, int: int, float: (int, float), type(None): type(None), Path: str}


def is_node(value: Any) -> bool:
    """Whether a value is a map with a ``_target_``."""
    return isinstance(value, Mapping) and TARGET in value


def class_name(kind: type) -> str:
    """Dotted path of a class, as an experiment file would write it."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true or false)"
    if isinstance(value, (int, float)):
        return f"{value} ({_PLAIN[type(value)]})"
    if isinstance(value, str):
        return f"'{value}' (text)"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if is_node(value):
        return f"a node of {value[TARGET]}"
    return f"a map of {', '.join(map(str, value)) or 'nothing'}" if isinstance(value, Mapping) else repr(value)


def describe_slot(hint: Any) -> str:
    """The values that a slot accepts, in words."""
    hint = strip(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_slot(part) for part in inner))
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"a list of {describe_slot(inner[0])}"
        return f"a list of {len(inner)} ({', '.join(describe_slot(part) for part in inner)})"
    kind = origin or hint
    if _is_mapping(kind):
        return f"a map from names to {describe_slot(inner[1])}" if len(inner) == 2 else "a map"
    if _is_sequence(kind):
        return f"a list of {describe_slot(inner[0])}" if inner else "a list"
    if kind in _PLAIN:
        return _PLAIN[kind]
    if inspect.isclass(kind):
        makers = sorted({class_name(sub) for sub in _concrete(kind) if _is_ours(sub)})
        such = f" such as {', '.join(makers[:4])}" if makers and makers != [class_name(kind)] else ""
        return f"a node of a {class_name(kind)}{such}"
    return str(hint).replace("typing.", "")


def mismatches(
    value: Any, hint: Any, where: str, class_of: ClassOf = lambda node: None, loose: Loose = lambda value, where: []
) -> list[Problem]:
    """Problems of putting ``value`` into a slot annotated ``hint``; empty where it fits. Insides of nodes are not looked at."""
    if get_origin(hint) is Annotated:
        inner, *limits = get_args(hint)
        return mismatches(value, inner, where, class_of, loose) or outside(value, limits, where)
    hint = strip(hint)
    if hint in (Any, inspect.Parameter.empty, object) or isinstance(hint, (TypeVar, str)):
        return loose(value, where)
    if get_origin(hint) in (Union, types.UnionType):
        outcomes = [mismatches(value, part, where, class_of, loose) for part in get_args(hint)]
        if [] in outcomes:
            return []
        for part, outcome in zip(get_args(hint), outcomes, strict=True):
            if get_origin(part) is Annotated and not mismatches(value, strip(part), where, class_of, loose):
                return outcome  # of the right kind, and outside of its limits
            if outcome[0].where != where:  # of what stands inside a container: the container itself was right
                return outcome
    elif is_node(value):
        kind = class_of(value)
        if kind is None or _holds(hint, kind):
            return []
    elif (elements := _elements(value, hint)) is not None:
        return [p for path, element, slot in elements for p in mismatches(element, slot, f"{where}{path}", class_of, loose)]
    return [Problem(where, describe(value), describe_slot(hint), _hint_for(value, hint))]


def _elements(value: Any, hint: Any) -> list[tuple[str, Any, Any]] | None:
    """Path, value and slot of what stands inside a value; none where it is plain, None where it does not fit itself."""
    inner, kind = get_args(hint), get_origin(hint) or hint
    slots: list[Any] = [inner[0] if inner else Any] * len(value) if isinstance(value, list) else []
    if kind in _PLAIN_VALUES or getattr(kind, "__name__", "") == "PathLike":
        fits = isinstance(value, _PLAIN_VALUES.get(kind, str)) and (kind is bool or not isinstance(value, bool))
    elif kind is Literal:
        fits = any(value == option and type(value) is type(option) for option in inner)
    elif kind is tuple or _is_sequence(kind):
        if kind is tuple and inner and Ellipsis not in inner:
            slots = list(inner)
        fits = isinstance(value, list) and len(slots) == len(value)
    elif is_named_tuple(kind):
        fits, slots = isinstance(value, list) and len(value) == len(kind._fields), []
    elif _is_mapping(kind) or is_typeddict(kind):
        if isinstance(value, Mapping):
            slot = inner[1] if len(inner) == 2 else Any
            return [(f".{key}", element, slot) for key, element in value.items() if element is not None]
        fits = False
    else:
        fits = not inspect.isclass(kind) and kind is not collections.abc.Callable
    if not fits:
        return None
    return [(f"[{i}]", element, slot) for i, (element, slot) in enumerate(zip(value, slots, strict=True))] if slots else []


def strip(hint: Any) -> Any:
    """A hint without ``Annotated``; ``None`` as its type."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return type(None) if hint is None else hint


def branch_for(value: Any, hint: Any) -> Any:
    """The member of a union that a plain container belongs to (the hint itself where it is no union)."""
    hint = strip(hint)
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    for part in get_args(hint):
        kind = get_origin(strip(part)) or strip(part)
        if isinstance(value, Mapping) and _is_mapping(kind):
            return strip(part)
        if isinstance(value, list) and (_is_sequence(kind) or kind is tuple or is_named_tuple(kind)):
            return strip(part)
        if isinstance(value, str) and kind is Path and str not in get_args(hint):
            return Path
    return Any


def is_named_tuple(kind: Any) -> bool:
    """Whether ``kind`` is a class made by ``NamedTuple``."""
    return inspect.isclass(kind) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _holds(hint: Any, kind: type) -> bool:
    """Whether an object of class ``kind`` may stand in a slot of ``hint`` (no union)."""
    slot = get_origin(hint) or hint
    if slot is collections.abc.Callable:
        return any("__call__" in vars(parent) for parent in kind.__mro__)  # of its instances: every class itself can be called
    if is_typeddict(slot):
        return False  # a plain map, which no node makes
    if not inspect.isclass(slot):
        return slot is not Literal
    if getattr(slot, "_is_protocol", False):
        return all(hasattr(kind, name) for name in getattr(slot, "__protocol_attrs__", ()))
    return issubclass(kind, slot)


def _hint_for(value: Any, hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    options = inner if origin in (Union, types.UnionType) else (hint,)
    if isinstance(value, str):
        if {int, float} & set(options) and re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", value):
            return did_you_mean(re.sub(r"^([-+]?\d+)(?=[eE])", r"\1.0", value) + ", without quotes")
        if bool in options and value.lower() in ("yes", "no", "on", "off", "true", "false"):
            return did_you_mean("true" if value.lower() in ("yes", "on", "true") else "false")
        literals = [option for part in options if get_origin(part) is Literal for option in get_args(part)]
        return did_you_mean(value, literals) if literals else ""
    return did_you_mean(str(int(value))) if isinstance(value, float) and int in options and value.is_integer() else ""


def _is_mapping(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, collections.abc.Mapping)


def _is_sequence(kind: Any) -> bool:
    if not inspect.isclass(kind) or issubclass(kind, (str, bytes, tuple)):
        return False
    return kind in (collections.abc.Iterable, collections.abc.Collection, set, frozenset, collections.abc.Set) or issubclass(
        kind, collections.abc.Sequence
    )


def _is_ours(kind: type) -> bool:
    """Whether a class can be suggested: one of this repository that stands in its module under its own name."""
    module = sys.modules.get(kind.__module__)
    return str(kind.__module__).split(".")[0] in ("umm_zoo", "data_pipelines") and getattr(module, kind.__name__, None) is kind


def _concrete(kind: type) -> list[type]:
    found = [] if inspect.isabstract(kind) else [kind]
    subclasses: list[type] = type.__subclasses__(kind)
    for sub in subclasses:
        found += _concrete(sub)
    return found
