"""Rollouts as plain values and tensors, as a checkpoint holds them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, cast, get_args, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A value of dataclasses, tensors, lists and plain values, with maps for dataclasses and all tensors on the CPU.

    What is nothing of these, such as an object in ``Batch.meta`` of a loader of one's own, becomes None: a checkpoint is loaded
    without running any code, and would not be loaded at all.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # not the storage that it is a view of
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Enum):
        return plain(value.value)
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return None if kind is None else kind(value)


def restored(kind: type[T], state: Mapping[str, Any], device: torch.device) -> T:
    """The dataclass that ``plain`` has taken apart, its tensors on ``device``."""
    hints = get_type_hints(kind)
    return kind(**{name: _restored(hints[name], value, device) for name, value in state.items()})


def _restored(hint: Any, value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    kinds: list[type[Any]] = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    if isinstance(value, Mapping):
        if made := next((kind for kind in kinds if is_dataclass(kind)), None):
            return restored(cast(type[Any], made), value, device)
        return {key: _restored(Any, inner, device) for key, inner in value.items()}
    if isinstance(value, list):
        named = next((kind for kind in kinds if issubclass(kind, Enum)), None)
        return [named(inner) if named else _restored(next(iter(get_args(hint)), Any), inner, device) for inner in value]
    return value
