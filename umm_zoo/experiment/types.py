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

from umm_zoo.errors import Problem, did_you_mean, nearest

#: Key of a node that names its class.
TARGET = "_target_"

#: Gives the class that a node will make, or None where that is unknown (and has been reported already).
ClassOf = Callable[[Mapping[str, Any]], type | None]

_PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null", Path: "a path"}


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
    """What a slot accepts, in words."""
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


def mismatches(value: Any, hint: Any, where: str, class_of: ClassOf = lambda node: None) -> list[Problem]:
    """Problems of putting ``value`` into a slot annotated ``hint``; empty where it fits. Insides of nodes are not looked at."""
    hint = strip(hint)
    if hint in (Any, inspect.Parameter.empty, object) or isinstance(hint, (TypeVar, str)):
        return []
    origin, inner = get_origin(hint), get_args(hint)
    wrong = [Problem(where, describe(value), describe_slot(hint), did_you_mean(_hint_for(value, hint)))]
    if origin in (Union, types.UnionType):
        return _union_mismatches(value, inner, where, class_of, wrong)
    if is_node(value):
        kind = class_of(value)
        return [] if kind is None or _holds(hint, kind) else wrong
    if origin is Literal:
        return [] if any(value == option and type(value) is type(option) for option in inner) else wrong
    kind = origin or hint
    if kind is tuple:
        return _tuple_mismatches(value, inner, where, class_of, wrong)
    if _is_mapping(kind) or is_typeddict(kind):
        if not isinstance(value, Mapping):
            return wrong
        slot = inner[1] if len(inner) == 2 else Any
        return [p for key, v in value.items() if v is not None for p in mismatches(v, slot, f"{where}.{key}", class_of)]
    if _is_sequence(kind):
        if not isinstance(value, list):
            return wrong
        return [p for i, v in enumerate(value) for p in mismatches(v, inner[0] if inner else Any, f"{where}[{i}]", class_of)]
    if kind in (bool, str, type(None)):
        return [] if isinstance(value, kind) else wrong
    if kind is Path or getattr(kind, "__name__", "") == "PathLike":
        return [] if isinstance(value, str) else wrong
    if kind is int:
        return [] if isinstance(value, int) and not isinstance(value, bool) else wrong
    if kind is float:
        return [] if isinstance(value, (int, float)) and not isinstance(value, bool) else wrong
    if is_named_tuple(kind):
        return [] if isinstance(value, list) and len(value) == len(kind._fields) else wrong
    return wrong if inspect.isclass(kind) or kind is collections.abc.Callable else []


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


def _union_mismatches(value: Any, parts: tuple[Any, ...], where: str, class_of: ClassOf, wrong: list[Problem]) -> list[Problem]:
    outcomes = [mismatches(value, part, where, class_of) for part in parts]
    if any(not outcome for outcome in outcomes):
        return []
    # what stands inside a container is the better message: the container itself was right
    return next((outcome for outcome in outcomes if outcome[0].where != where), wrong)


def _tuple_mismatches(value: Any, inner: tuple[Any, ...], where: str, class_of: ClassOf, wrong: list[Problem]) -> list[Problem]:
    if not isinstance(value, list):
        return wrong
    if not inner:
        return []
    slots = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
    if len(slots) != len(value):
        return wrong
    return [p for i, (v, slot) in enumerate(zip(value, slots, strict=True)) for p in mismatches(v, slot, f"{where}[{i}]", class_of)]


def _holds(hint: Any, kind: type) -> bool:
    """Whether an object of class ``kind`` may stand in a slot of ``hint`` (no union)."""
    slot = get_origin(hint) or hint
    if slot is collections.abc.Callable:
        return any("__call__" in vars(parent) for parent in kind.__mro__)  # of its instances: every class itself can be called
    if not inspect.isclass(slot):
        return slot is not Literal
    if getattr(slot, "_is_protocol", False):
        return all(hasattr(kind, name) for name in getattr(slot, "__protocol_attrs__", ()))
    return issubclass(kind, slot)


def _hint_for(value: Any, hint: Any) -> str | None:
    origin, inner = get_origin(hint), get_args(hint)
    options = set(inner) if origin in (Union, types.UnionType) else {hint}
    if isinstance(value, str):
        if options & {int, float} and re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", value):
            return re.sub(r"^([-+]?\d+)(?=[eE])", r"\1.0", value) + ", without quotes"
        if bool in options and value.lower() in ("yes", "no", "on", "off", "true", "false"):
            return "true" if value.lower() in ("yes", "on", "true") else "false"
        literals = [
            o for part in (inner if origin is not Literal else [hint]) if get_origin(part) is Literal for o in get_args(part)
        ]
        return nearest(value, literals) if literals else None
    if isinstance(value, float) and int in options and value.is_integer():
        return str(int(value))
    return None


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
    return kind.__module__.split(".")[0] in ("umm_zoo", "data_pipelines") and getattr(module, kind.__name__, None) is kind


def _concrete(kind: type) -> list[type]:
    found = [] if inspect.isabstract(kind) else [kind]
    subclasses: list[type] = type.__subclasses__(kind)
    for sub in subclasses:
        found += _concrete(sub)
    return found
