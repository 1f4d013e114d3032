"""Whose classes an experiment may name: those of a file that the user has written, and those of weights that somebody else has.

An experiment file is code of the user's own. The experiment inside a checkpoint may be a stranger's: it gets this package's
classes, a short list of the libraries', and those of modules that the user allows; nothing else is even imported.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from umm_zoo.errors import Problem, UserError
from umm_zoo.experiment.targets import Target, find_target
from umm_zoo.experiment.types import TARGET, class_name

#: Packages whose classes are this project's own.
OWN = ("umm_zoo", "data_pipelines")
#: Classes that any experiment may make, an open map included: what is built of them runs no program and writes no file.
ROLES = (
    "torch.nn.Module",
    "lightning.Callback",
    "lightning.LightningDataModule",
    "torchmetrics.Metric",
)
#: Argument of a node that loads other weights (``Method.load``): the modules that these may name.
PASSED_ON = "trust"
#: Roles of the ``trainer`` map alone.
_TRAINER_ROLES = (
    "lightning.pytorch.loggers.logger.Logger",
    "lightning.pytorch.profilers.profiler.Profiler",
    "lightning.pytorch.strategies.Strategy",
    "lightning.pytorch.accelerators.Accelerator",
    "lightning.pytorch.plugins.precision.Precision",
    "lightning.pytorch.plugins.environments.ClusterEnvironment",
    "lightning.fabric.plugins.environments.cluster_environment.ClusterEnvironment",
    "lightning.fabric.plugins.io.checkpoint_io.CheckpointIO",
    "lightning.pytorch.plugins.layer_sync.LayerSync",
)
#: Packages of libraries whose classes of a role weights may name.
_LIBRARIES = ("torch.nn.modules", "lightning.pytorch.callbacks", "torchmetrics")
#: Among these, such as fetch networks by their names, some with programs beside them.
_LOADERS = ("torchmetrics.multimodal", "torchmetrics.text.bert", "torchmetrics.text.infolm", "torchmetrics.functional")
_IMPORTED = ("torch.nn", "lightning.pytorch.callbacks", "torchmetrics")  # by these names

#: Top modules that no user has written.
_NOT_USERS = {*OWN, "torch", "lightning", "torchmetrics", "builtins"}
#: Where the environment is filled in; and the start of a text that cannot be an address before it.
_ENVIRONMENT = re.compile(r"\$\{oc\.(env|decode):")
_ENVIRONMENT_FIRST = re.compile(r"\$\{oc\.env:[^{}]*\}|\$\{oc\.decode:\$\{oc\.env:[^{}]*\}\}$")

_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed", default=())


@contextmanager
def trusting(modules: Iterable[str]) -> Iterator[None]:
    """For a time, weights that are loaded may name classes of these modules too."""
    token = _allowed.set((*_allowed.get(), *modules))
    try:
        yield
    finally:
        _allowed.reset(token)


@dataclass(frozen=True)
class Trust:
    """What the nodes of one experiment may name.

    Args:
        embedded: whether it comes out of weights.
        modules: what the user allows the experiment in weights to name, such as ``my_blocks``.
    """

    embedded: bool = False
    modules: tuple[str, ...] = ()

    def may_import(self, path: str) -> bool:
        """Whether the module of a dotted path may be imported at all."""
        return not self.embedded or _within(path, (*OWN, *_IMPORTED, *self._trusted()))

    def refusal(self, path: str, target: Target | None = None, in_trainer: bool = False) -> Problem | None:
        """The reason for which a node may not be made; None where it may. Without ``target`` it is not imported yet."""
        module, kind = (path.rpartition(".")[0], None) if target is None else (_module_of(target), target.kind)
        if not self.embedded:
            if kind is None or self._is_users(module) or _is_own(kind) or _has_role(kind, in_trainer):
                return None
            found = f"'{path}', a class of {module}"
            return Problem(
                "", found, "a module, callback or metric, or a class of umm_zoo or of your own beside the experiment file"
            )
        if _within(module, self._trusted()) or (target is None and self.may_import(path)):
            return None
        library = _within(module, _LIBRARIES) and not _within(module, _LOADERS)
        if kind is not None and (_within(module, OWN) or (library and _has_role(kind, False))):
            return None
        allowing = module if _within(module, _LOADERS) else module.split(".")[0] or path
        hint = f"--trust {allowing} allows it, if you know who wrote these weights"
        return Problem("", f"'{path}' in the experiment of the weights", "classes of umm_zoo", hint)

    def loose(self, value: Any, where: str) -> list[Problem]:
        """Problems of nodes of weights in a place that names no class: what is made there must have a role."""
        if isinstance(value, list):
            return [p for index, item in enumerate(value) for p in self.loose(item, f"{where}[{index}]")]
        if not self.embedded or not isinstance(value, Mapping):
            return []
        if TARGET not in value:
            return [p for key, item in value.items() for p in self.loose(item, f"{where}.{key}")]
        if (kind := self.class_of(value)) is None or _has_role(kind, False) or _within(kind.__module__, self._trusted()):
            return []
        return [Problem(where, f"a node of {class_name(kind)}", "plain values, or a node of a module, callback or metric")]

    def passed_on(self, node: Mapping[str, Any], where: str) -> list[Problem]:
        """Problems of modules that a node of weights lets other weights name: it may pass on what the user allows, and no more."""
        named = node.get(PASSED_ON)
        named = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        if not self.embedded or not (more := [name for name in named if not _within(str(name), self._trusted())]):
            return []
        hint = f"--trust {more[0]} allows it, if you know who wrote these weights"
        return [Problem(f"{where}.{PASSED_ON}", f"'{more[0]}' in the experiment of the weights", "modules that you allow", hint)]

    def class_of(self, node: Mapping[str, Any]) -> type | None:
        """The class that a node makes; None where its target may not be imported, or cannot be found."""
        path = node[TARGET]
        if not isinstance(path, str) or not self.may_import(path):
            return None
        try:
            return find_target(path).kind
        except UserError:
            return None

    def _trusted(self) -> tuple[str, ...]:
        return (*self.modules, *_allowed.get())

    @staticmethod
    def _is_users(module: str) -> bool:
        """Whether a module is neither Python's nor of an installed library."""
        name = module.split(".")[0]
        top = sys.modules.get(name)
        places = [*(getattr(top, "__path__", None) or ()), getattr(top, "__file__", None) or ""]
        installed = any(f"{os.sep}{folder}{os.sep}" in place for place in places for folder in ("site-packages", "dist-packages"))
        return name not in sys.stdlib_module_names and not installed


def is_of_users(kind: type) -> bool:
    """Whether a class is neither of this project nor of the libraries that it knows."""
    return kind.__module__.split(".")[0] not in _NOT_USERS


def users_modules(tree: Any) -> set[str]:
    """Modules that the nodes of an experiment name beside those of this project."""
    if isinstance(tree, (list, tuple)):
        return set().union(*map(users_modules, tree))
    if not isinstance(tree, Mapping):
        return set()
    path = tree.get(TARGET)
    own = {path.split(".")[0]} if isinstance(path, str) and "." in path else set()
    return (own - _NOT_USERS).union(*map(users_modules, tree.values()))


def secrets(unfilled: Any, given: Iterable[str] = (), where: str = "") -> Iterator[Problem]:
    """Texts of weights that would put what stands in the environment into an address: it could be the stranger's.

    Args:
        unfilled: the experiment, with all but the environment filled in.
        given: dotted keys that the user has given himself.
        where: path of ``unfilled``.
    """
    if where and _within(where, given):
        return
    if isinstance(unfilled, Mapping):
        for key, value in unfilled.items():
            yield from secrets(value, given, f"{where}.{key}" if where else str(key))
    elif isinstance(unfilled, list):
        for value in unfilled:
            yield from secrets(value, given, where)
    elif isinstance(unfilled, str) and _ENVIRONMENT.search(unfilled):
        start = _ENVIRONMENT_FIRST.match(unfilled)
        here = unfilled.startswith(("/", "./", "../", "~"))  # on this machine, whatever follows
        if not here and (start is None or _ENVIRONMENT.search(unfilled, start.end())):
            found = f"'{unfilled}' in the experiment of the weights, which may take a secret elsewhere"
            yield Problem(where, found, "the value itself", f"give it on the command line: {where}=…")


def _module_of(target: Target) -> str:
    """The module that what is called was defined in, by whatever path it was reached."""
    called = getattr(target.call, "__func__", target.call)  # a classmethod's own function: a base class may have defined it
    return str(getattr(called, "__module__", None) or target.kind.__module__)


def _is_own(kind: type) -> bool:
    return any(_within(parent.__module__, OWN) for parent in kind.__mro__)


def _within(path: str, packages: Iterable[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _has_role(kind: type, in_trainer: bool) -> bool:
    return issubclass(kind, _classes(ROLES)) or (in_trainer and issubclass(kind, _classes(_TRAINER_ROLES)))


@cache
def _classes(paths: tuple[str, ...]) -> tuple[type, ...]:
    found = []
    for path in paths:
        module, _, name = path.rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    return tuple(found)
