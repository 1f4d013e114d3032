"""Objects of a checked experiment: the only place where a string becomes a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from umm_zoo.errors import REFUSALS, UserError, locating
from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.targets import Target, TargetError, find_target
from umm_zoo.experiment.types import TARGET, branch_for, is_named_tuple, is_node, mismatches

if TYPE_CHECKING:
    from lightning import Callback, LightningDataModule
    from torchmetrics import Metric

    from umm_zoo.method import Method


@dataclass
class Built:
    """The objects of an experiment."""

    method: Method
    data: LightningDataModule
    callbacks: dict[str, Callback]
    metrics: dict[str, Metric]


def build(node: Mapping[str, Any], path: str = "") -> Any:
    """Build a node: its arguments first, then the object. Not checked; call ``check`` on the experiment before.

    Args:
        node: a map with ``_target_``; the other keys are keyword arguments.
        path: where the node stands, for messages.

    Raises:
        UserError: no such target, or a constructor raised ValueError, TypeError, OSError, ImportError.
    """
    try:
        target = find_target(str(node[TARGET]))
    except TargetError as error:
        raise UserError(path or str(node[TARGET]), [error.problem]) from None
    arguments = build_arguments(target, node, path)
    try:
        return target.call(**arguments)
    except UserError as error:
        error.locate(place=path)
        raise
    except REFUSALS as error:
        raise UserError(path or str(node[TARGET]), f"{node[TARGET]}: {error or type(error).__name__}") from error


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
    with locating(experiment.file):
        data: LightningDataModule = build(experiment.data, "data")
    for hook in ("prepare_data", "setup", "train_dataloader", "val_dataloader"):
        setattr(data, hook, _DataHook(getattr(data, hook), experiment.file))
    return data


class _DataHook:
    """A hook of a data module; what it refuses is said to be of the data."""

    def __init__(self, hook: Callable[..., Any], file: str) -> None:
        self.__wrapped__, self.file = hook, file  # by this name Lightning sees whether the class has a hook of its own

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with locating(self.file, "data", REFUSALS):
            return self.__wrapped__(*arguments, **named)


def build_experiment(experiment: Experiment, data: LightningDataModule | None = None) -> Built:
    """Build the parts of a checked experiment. The method comes first, so that its weights depend on the seed alone.

    Args:
        experiment: what to build.
        data: the data module, where it has been built already.

    Raises:
        UserError: a constructor refused its arguments; the line names the node.
    """
    with locating(experiment.file):
        return Built(
            build(experiment.method, "method"),
            data if data is not None else build_data(experiment),
            {name: build(node, f"callbacks.{name}") for name, node in experiment.callbacks.items()},
            {name: build(node, f"metrics.{name}") for name, node in experiment.metrics.items()},
        )
