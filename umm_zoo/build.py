"""The only place where a string becomes a class: check a whole experiment against signatures and type hints, then build it.

``check`` collects every problem before anything is constructed. A dotted path is code: only classes and classmethods may be
targets, and a stranger's experiment file should be read before it is run.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from umm_zoo.experiment import TARGET, Experiment, Problem, UserError, nearest
from umm_zoo.slots import branch_for, class_name, describe, describe_slot, is_named_tuple, is_node, mismatches

if TYPE_CHECKING:
    from lightning import Callback, LightningDataModule
    from torchmetrics import Metric

    from umm_zoo.method import Method

#: What the commands give to the trainer themselves, and where an experiment file says it instead.
RESERVED = {"callbacks": "the map 'callbacks' of the experiment", "default_root_dir": "the option --runs of the command"}
_USER_MISTAKES = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


class BuildError(UserError):
    """A constructor refused its arguments."""


class TargetError(Exception):
    """A dotted path that cannot be a target; ``problem`` says why."""

    def __init__(self, found: str, accepted: str, meant: str | None = None) -> None:
        self.problem = Problem("", found, accepted, meant)
        super().__init__(str(self.problem))


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


@dataclass
class Built:
    """The objects of an experiment."""

    method: Method
    data: LightningDataModule
    callbacks: dict[str, Callback]
    metrics: dict[str, Metric]


# -- targets -----------------------------------------------------------------------------------------------------------------


@cache
def find_target(path: str) -> Target:
    """The class or classmethod at a dotted path.

    Raises:
        TargetError: nothing is there, or something that is neither.
    """
    accepted = "the dotted path of a class or classmethod"
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise TargetError(f"'{path}'", accepted + " (package.module.Class)")
    module, rest = _import_longest(parts)
    here: Any = module
    for index, part in enumerate(rest):
        if not hasattr(here, part):
            owner = ".".join(parts[: len(parts) - len(rest) + index])
            names = [name for name in dir(here) if not name.startswith("_")]
            if inspect.ismodule(here) and hasattr(here, "__path__"):
                names += [info.name for info in pkgutil.iter_modules(here.__path__)]
            meant = nearest(part, names)
            raise TargetError(f"'{path}', but {owner} has no '{part}'", accepted, f"{owner}.{meant}" if meant else None)
        here = getattr(here, part)
    return _target_of(here, path)


def _import_longest(parts: list[str]) -> tuple[Any, list[str]]:
    """The deepest module that ``parts`` starts with, and the attributes that remain."""
    path, accepted = ".".join(parts), "an importable module"
    module = None
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                return _or_no_module(module, parts, end - 1)
            raise TargetError(f"'{path}', whose module needs '{error.name}', which is not installed", accepted) from None
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TargetError(f"'{path}', whose module {name} fails on import ({reason})", accepted) from None
    return module, []


def _or_no_module(module: Any, parts: list[str], end: int) -> tuple[Any, list[str]]:
    if module is None:
        meant = nearest(parts[0], [info.name for info in pkgutil.iter_modules()])
        where = "neither installed, nor beside the experiment file, nor in the current directory"
        raise TargetError(f"'{'.'.join(parts)}', but module '{parts[0]}' is {where}", "an importable module", meant)
    return module, parts[end:]


def _target_of(found: Any, path: str) -> Target:
    if inspect.isclass(found):
        if inspect.isabstract(found):
            raise TargetError(f"'{path}', an abstract class", describe_slot(found).removeprefix("a node of "))
        return _read_signature(found, found, found.__init__)
    if inspect.ismethod(found) and inspect.isclass(found.__self__):
        return _read_signature(found, _returned(found), found.__func__)
    kind = "a module" if inspect.ismodule(found) else "a function" if callable(found) else f"an object of {type(found).__name__}"
    raise TargetError(f"'{path}', which is {kind}", "a class or a classmethod")


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


def _class_of(node: Mapping[str, Any]) -> type | None:
    try:
        return find_target(str(node[TARGET])).kind
    except TargetError:
        return None


# -- checking ----------------------------------------------------------------------------------------------------------------


def check(experiment: Experiment) -> None:
    """Check every node, argument and value of an experiment; nothing is built.

    Raises:
        UserError: with every problem found.
    """
    experiment.use_folders()
    importlib.invalidate_caches()
    problems: list[Problem] = []
    for path, node, kind in slots_of(experiment):
        if not is_node(node):
            problems.append(Problem(path, describe(node) if node else "nothing", describe_slot(kind)))
        else:
            problems += mismatches(node, kind, path, _class_of)
        problems += _inside(node, path)
    problems += _trainer_problems(experiment.trainer)
    if problems:
        raise UserError(experiment.file, problems)


def slots_of(experiment: Experiment) -> Iterable[tuple[str, Any, type]]:
    """(path, node, class it must be) of the envelope's own slots."""
    from lightning import Callback, LightningDataModule
    from torchmetrics import Metric

    from umm_zoo.method import Method

    yield "method", experiment.method, Method
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
    except TargetError as error:
        wrong = error.problem
        return [Problem(f"{path}.{TARGET}", wrong.found, wrong.accepted, wrong.meant), *below]
    return _argument_problems(target, value, path) + below


def _argument_problems(target: Target, node: Mapping[str, Any], path: str) -> list[Problem]:
    problems = []
    name = class_name(target.call) if inspect.isclass(target.call) else str(node[TARGET])
    known, misspelt = list(target.hints), set()
    for key, value in node.items():
        if key == TARGET:
            continue
        if key in target.hints:
            problems += mismatches(value, target.hints[key], f"{path}.{key}", _class_of)
        elif not target.open:
            meant = nearest(str(key), known)
            misspelt.add(meant)
            short = meant is not None and len(known) > 12
            accepted = f"{len(known)} others" if short else ", ".join(known) or "none"
            problems.append(Problem(f"{path}.{key}", f"an unknown argument '{key}'", f"the arguments of {name}: {accepted}", meant))
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


# -- building ----------------------------------------------------------------------------------------------------------------


def build(node: Mapping[str, Any], path: str = "") -> Any:
    """Build a node: its arguments first, then the object. Not checked; call ``check`` on the experiment before.

    Args:
        node: a map with ``_target_``; the other keys are keyword arguments.
        path: where the node stands, for messages.

    Raises:
        BuildError: no such target, or a constructor raised ValueError, TypeError, OSError, ImportError.
    """
    try:
        target = find_target(str(node[TARGET]))
    except TargetError as error:
        raise BuildError(path or str(node[TARGET]), [error.problem]) from None
    arguments = build_arguments(target, node, path)
    try:
        return target.call(**arguments)
    except _USER_MISTAKES as error:
        raise BuildError(path or str(node[TARGET]), f"{node[TARGET]}: {error or type(error).__name__}") from error


def build_arguments(target: Target, node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The keyword arguments of a node (or of a plain map), with every node below them built."""
    return {
        key: _build_value(value, target.hints.get(key, Any), f"{path}.{key}" if path else str(key))
        for key, value in node.items()
        if key != TARGET
    }


def _build_value(value: Any, hint: Any, path: str) -> Any:
    if is_node(value):
        return build(value, path)
    hint = branch_for(value, hint)
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if isinstance(value, Mapping):
        slot = inner[1] if len(inner) == 2 and origin is not tuple else Any
        removes_null = slot is not Any and bool(mismatches(None, slot, path))
        return {k: _build_value(v, slot, f"{path}.{k}") for k, v in value.items() if not (v is None and removes_null)}
    if isinstance(value, list):
        slots = _element_slots(origin, inner, len(value))
        items = [_build_value(v, slot, f"{path}[{i}]") for i, (v, slot) in enumerate(zip(value, slots, strict=True))]
        if is_named_tuple(origin):
            return origin(*items)
        return tuple(items) if origin is tuple else items
    return Path(value) if isinstance(value, str) and hint is Path else value


def _element_slots(origin: Any, inner: tuple[Any, ...], size: int) -> list[Any]:
    if origin is tuple and len(inner) == size and Ellipsis not in inner:
        return list(inner)
    return [inner[0] if inner else Any] * size


def build_data(experiment: Experiment) -> LightningDataModule:
    """Build the data module of a checked experiment.

    Raises:
        UserError: its constructor, or one below it, refused its arguments.
    """
    experiment.use_folders()
    try:
        data: LightningDataModule = build(experiment.data, "data")
        return data
    except BuildError as error:
        raise UserError(experiment.file, error.lines()) from error


def build_experiment(experiment: Experiment, data: LightningDataModule | None = None) -> Built:
    """Build the parts of a checked experiment. The method comes first, so that its weights depend on the seed alone.

    Args:
        experiment: what to build.
        data: the data module, where it has been built already.

    Raises:
        UserError: a constructor refused its arguments; the line names the node.
    """
    experiment.use_folders()
    try:
        return Built(
            build(experiment.method, "method"),
            data if data is not None else build_data(experiment),
            {name: build(node, f"callbacks.{name}") for name, node in experiment.callbacks.items()},
            {name: build(node, f"metrics.{name}") for name, node in experiment.metrics.items()},
        )
    except BuildError as error:
        raise UserError(experiment.file, error.lines()) from error


def forget_modules() -> None:
    """Forget which targets were found, for callers that change modules while running (tests, notebooks)."""
    find_target.cache_clear()


__all__ = [
    "BuildError",
    "Built",
    "Target",
    "TargetError",
    "build",
    "build_arguments",
    "build_data",
    "build_experiment",
    "check",
    "find_target",
    "forget_modules",
]
