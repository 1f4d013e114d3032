"""Dotted paths of an experiment file: the class or classmethod at each, and what its signature says.

A dotted path is code: only classes and classmethods may be targets, and a stranger's file should be read before it is run.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sysconfig
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from umm_zoo.errors import UserError, did_you_mean, nearest
from umm_zoo.experiment.importing import importing
from umm_zoo.experiment.types import describe_slot

#: Packages whose classes experiments name.
NAMED_LIBRARIES = ("umm_zoo", "data_pipelines", "lightning", "torch", "torchmetrics")
#: Files of a package that are looked through for a class which stands elsewhere in it; torch has more.
_FEW_FILES = 1000


@dataclass(frozen=True)
class Target:
    """A class or classmethod, and what its signature says.

    Args:
        call: what is called with the arguments of the node.
        kind: the class of the object that comes out.
        hints: annotation per argument name (``inspect.Parameter.empty`` where there is none).
        required: arguments without a default.
        open: whether it takes arguments that its signature does not name (only libraries do).
    """

    call: Callable[..., Any]
    kind: type
    hints: dict[str, Any]
    required: tuple[str, ...]
    open: bool


@cache
def find_target(path: str) -> Target:
    """The class or classmethod at a dotted path.

    Raises:
        UserError: nothing is there, or something that is neither.
    """
    expected = "the dotted path of a class or classmethod"
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise UserError("", f"'{path}'", expected + " (package.module.Class)")
    module, rest = _import_longest(parts)
    here: Any = module
    for index, part in enumerate(rest):
        if not hasattr(here, part):
            owner = ".".join(parts[: len(parts) - len(rest) + index])
            hint = did_you_mean(_meant(here, owner, rest[index:]))
            raise UserError("", f"'{path}', but {owner} has no '{part}'", expected, hint)
        here = getattr(here, part)
    return _target_of(here, path)


def _meant(here: Any, owner: str, rest: Sequence[str]) -> str | None:
    """What may be meant by ``rest`` behind ``owner``, which has no such thing: first of all the same class in another module."""
    names = [name for name in dir(here) if not name.startswith("_")]
    if inspect.ismodule(here) and hasattr(here, "__path__"):
        names += [info.name for info in pkgutil.iter_modules(here.__path__)]
    near, inside = nearest(rest[0], names), _classes_of(owner.split(".")[0]) if inspect.ismodule(here) else {}
    for place, name in enumerate(rest):
        found = [module for module in inside.get(name, ()) if module != owner]
        if found and f"{owner}.{near}" not in found:
            module = next((own for own in found if own.startswith(f"{owner}.")), found[0])
            return ".".join([module, *rest[place:]])
    if near:
        return f"{owner}.{near}"
    below = {name: own for name, modules in inside.items() for own in modules if own.startswith(f"{owner}.")}
    return f"{below[meant]}.{meant}" if (meant := nearest(rest[0], below)) else None


def _classes_of(package: str) -> dict[str, list[str]]:
    """Modules that define a class, by its name, of a package whose files are few; they are read and not imported."""
    found = dict[str, list[str]]()
    for root in map(Path, getattr(importlib.import_module(package), "__path__", ())):
        files = list(islice(root.rglob("*.py"), _FEW_FILES + 1))
        for file in sorted(files) if len(files) <= _FEW_FILES else ():
            inside = [package, *file.relative_to(root).with_suffix("").parts]
            module = ".".join(inside[:-1] if inside[-1] == "__init__" else inside)
            for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
                found.setdefault(name, []).append(module)
    return found


def _import_longest(parts: list[str]) -> tuple[Any, list[str]]:
    """The deepest module that ``parts`` starts with, and the attributes that remain."""
    path, expected = ".".join(parts), "an importable module"
    module = None
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        try:
            with importing():
                module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                return _or_no_module(module, parts, end - 1)
            raise UserError("", f"'{path}', whose module needs '{error.name}', which is not installed", expected) from None
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError("", f"'{path}', whose module {name} fails on import ({reason})", expected) from None
    return module, []


def _or_no_module(module: Any, parts: list[str], end: int) -> tuple[Any, list[str]]:
    if module is None:
        meant = nearest(parts[0], _top_modules())
        where = "neither installed, nor beside the experiment file, nor in the current directory or its src"
        found = f"'{'.'.join(parts)}', but module '{parts[0]}' is {where}"
        raise UserError("", found, "an importable module", did_you_mean(meant))
    return module, parts[end:]


def _top_modules() -> list[str]:
    """Modules that a user may mean: this project's, those whose classes experiments name, and what lies beside his files."""
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    beside = [
        i.name for i in pkgutil.iter_modules() if not str(getattr(i.module_finder, "path", installed[0])).startswith(installed)
    ]
    return [*NAMED_LIBRARIES, *beside]


def _target_of(found: Any, path: str) -> Target:
    if inspect.isclass(found):
        if inspect.isabstract(found):
            raise UserError("", f"'{path}', an abstract class", describe_slot(found).removeprefix("a node of "))
        return _read_signature(found, found, found.__init__)
    if inspect.ismethod(found) and inspect.isclass(found.__self__):
        return _read_signature(found, _returned(found), found.__func__)
    kind = "a module" if inspect.ismodule(found) else "a function" if callable(found) else f"an object of {type(found).__name__}"
    raise UserError("", f"'{path}', which is {kind}", "a class or a classmethod")


def _returned(method: Any) -> type:
    """The class that a classmethod says it returns; its own class where it says ``Self`` or nothing."""
    hint = _hints(method.__func__).get("return")
    return hint if inspect.isclass(hint) and not issubclass(method.__self__, hint) else method.__self__


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, TypeError):  # a name imported for type checkers only: such slots are not checked
        return {key: value for key, value in getattr(function, "__annotations__", {}).items() if not isinstance(value, str)}


def _read_signature(call: Any, kind: type, function: Any) -> Target:
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except ValueError:  # written in C without a signature
        return Target(call, kind, {}, (), True)
    if getattr(function, "__module__", "") == "torch.nn.modules.module":
        return Target(call, kind, {}, (), False)  # no constructor of its own, and torch's takes nothing
    hints = _hints(function)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Target(
        call,
        kind,
        {p.name: hints.get(p.name, inspect.Parameter.empty) for p in named},
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )
