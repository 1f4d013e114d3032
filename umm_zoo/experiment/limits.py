"""Limits of what stands in the envelope of an experiment, checked before any class is imported.

Those of a class's own arguments stand at its constructor, as ``Annotated[float, Interval(ge=0)]`` of the library annotated-types.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from annotated_types import BaseMetadata, GroupedMetadata, Interval

from umm_zoo.errors import Problem, UserError, did_you_mean

#: Levels of lists and maps in a file (ours have 8); Python's and YAML's own stacks end at some thousands.
MAX_DEPTH = 100
#: Numbers of the ``trainer`` map; -1 stands for no limit where the second value says so.
_TRAINER: dict[str, tuple[Interval, bool]] = {
    "max_steps": (Interval(ge=1), True),
    "min_steps": (Interval(ge=0), False),
    "max_epochs": (Interval(ge=1), True),
    "min_epochs": (Interval(ge=0), False),
    "val_check_interval": (Interval(ge=1), False),
    "check_val_every_n_epoch": (Interval(ge=1), False),
    "accumulate_grad_batches": (Interval(ge=1), False),
    "log_every_n_steps": (Interval(ge=0), False),
    "num_sanity_val_steps": (Interval(ge=0), True),
    "gradient_clip_val": (Interval(ge=0, lt=math.inf), False),
    "limit_train_batches": (Interval(ge=0), False),
    "limit_val_batches": (Interval(ge=0), False),
    "devices": (Interval(ge=1, le=1024), True),
    "num_nodes": (Interval(ge=1), False),
}
#: Numbers in a library's configuration of a network: no network has more, and building one takes the machine's memory or hours.
_NETWORK = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "depth"), Interval(ge=1, le=1000)),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size"), Interval(ge=1, le=2**20)),
    "vocab_size": Interval(ge=1, le=2**24),
}
#: Processes that any machine can bear on its CPU.
_FEW = 8
#: Bounds by the name of their attribute, as annotated-types has them: what holds inside, and words for it.
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "from {} on"),
    "gt": (operator.gt, "above {}"),
    "le": (operator.le, "up to {}"),
    "lt": (operator.lt, "below {}"),
}
#: Words of the ``trainer`` map, which Lightning's hints call text.
_WORDS = {
    "profiler": ("simple", "advanced", "pytorch", "xla"),
    "gradient_clip_algorithm": ("norm", "value"),
    "deterministic": ("warn",),
}
#: Keys of the ``trainer`` map that count whole things, though Lightning takes a share of a loader too.
_WHOLE = ("val_check_interval", "limit_val_batches", "limit_train_batches")


def outside(value: Any, limits: tuple[Any, ...] | list[Any], where: str) -> list[Problem]:
    """The problem of a number outside of its limits; empty where it lies inside, or is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # NaN is found everywhere
        return []
    bounds = [bound for limit in limits for bound in (limit if isinstance(limit, GroupedMetadata) else [limit])]
    bounds = [bound for bound in bounds if isinstance(bound, BaseMetadata)]
    if all(_holds(value, bound) for bound in bounds):
        return []
    words = " and ".join(filter(None, map(_words, bounds)))
    finite = "a finite number" if any(getattr(bound, "lt", None) == math.inf for bound in bounds) else "a number"
    return [Problem(where, f"{value}", f"{finite} {words}".strip())]


def _holds(value: float, bound: Any) -> bool:
    return all(compare(value, getattr(bound, name)) for name, (compare, _) in _BOUNDS.items() if hasattr(bound, name))


def _words(bound: Any) -> str:
    limits = [(getattr(bound, name), words) for name, (_, words) in _BOUNDS.items() if hasattr(bound, name)]
    return " and ".join(words.format(limit) for limit, words in limits if limit != math.inf)


def envelope_limits(tree: Mapping[str, Any]) -> Iterator[Problem]:
    """Numbers of the envelope that no run can have."""
    yield from not_numbers(tree, "")
    yield from heads_that_do_not_divide(tree.get("method"), "method")
    yield from _sizes_of_no_network(tree.get("method"), "method")
    yield from outside(tree.get("seed", 0), [Interval(ge=0, le=2**32 - 1)], "seed")
    trainer = tree.get("trainer")
    if not isinstance(trainer, Mapping):
        return
    for key, (interval, unlimited) in _TRAINER.items():
        value, whole = trainer.get(key), key in _WHOLE
        if key == "val_check_interval" and trainer.get("check_val_every_n_epoch") is not None and isinstance(value, float):
            interval, whole = Interval(gt=0, le=1), False  # a share of an epoch
        if problems := [] if unlimited and value == -1 else outside(value, [interval], f"trainer.{key}"):
            yield from problems
        elif whole and isinstance(value, float) and value not in (0.0, 1.0):
            yield Problem(f"trainer.{key}", f"{value}", "a whole number: a share would be of another size on every rank")
    for key, words in _WORDS.items():
        if isinstance(value := trainer.get(key), str) and value not in words:
            yield Problem(f"trainer.{key}", f"'{value}'", f"one of {', '.join(words)}", did_you_mean(value, words))
    if trainer.get("accelerator") == "cpu":
        yield from too_many_processes(trainer.get("devices"))
    if trainer.get("sync_batchnorm") is True and trainer.get("accelerator") == "cpu":
        yield Problem("trainer.sync_batchnorm", "true on the CPU", "false: torch synchronises statistics on GPUs alone")
    time = trainer.get("max_time")
    if isinstance(time, str) and not (re.fullmatch(r"\d+:\d\d:\d\d:\d\d", time) and re.search("[1-9]", time)):
        yield Problem("trainer.max_time", f"'{time}'", "days:hours:minutes:seconds, such as 00:12:00:00")
    every, steps = trainer.get("val_check_interval"), trainer.get("max_steps")
    if tree.get("metrics") and isinstance(every, int) and type(steps) is int and 0 < steps < every:
        found = f"{every}, which is above trainer.max_steps {steps}: nothing would ever be validated"
        yield Problem("trainer.val_check_interval", found, f"a number from 1 to {steps}")


def too_many_processes(devices: Any) -> Iterator[Problem]:
    """Ranks on the CPU beyond what the machine can bear: nothing else limits how many are started."""
    most = max(_FEW, os.cpu_count() or 1)
    if isinstance(devices, int) and devices > most:
        yield Problem("trainer.devices", f"{devices} processes on the CPU", f"at most {most} on this machine")


def _sizes_of_no_network(value: Any, where: str) -> Iterator[Problem]:
    """Numbers of a library's configuration, wherever it stands, that no network can be built with."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _sizes_of_no_network(item, f"{where}[{index}]")
    for key, item in value.items() if isinstance(value, Mapping) else ():
        yield from _sizes_of_no_network(item, f"{where}.{key}")
        if isinstance(key, str) and key in _NETWORK:
            yield from outside(item, [_NETWORK[key]], f"{where}.{key}")


def heads_that_do_not_divide(value: Any, where: str) -> Iterator[Problem]:
    """Attention heads of a library's configuration, wherever it stands, that its width cannot be split into."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from heads_that_do_not_divide(item, f"{where}[{index}]")
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        yield from heads_that_do_not_divide(item, f"{where}.{key}")
    numbers = {key: item for key, item in value.items() if isinstance(item, int) and not isinstance(item, bool)}
    heads = next((key for key in ("num_attention_heads", "num_heads", "n_head") if key in numbers), "")
    width = next((key for key in ("hidden_size", "n_embd", "embed_dim") if key in numbers), "")
    if heads and numbers[heads] < 1:
        yield Problem(f"{where}.{heads}", f"{numbers[heads]}", "1 or more")
        return
    if heads and width and not {"head_dim", "attention_head_dim", "d_kv"} & numbers.keys() and numbers[width] % numbers[heads]:
        yield Problem(f"{where}.{heads}", f"{numbers[heads]}", f"a divisor of {width}, {numbers[width]}")
    shared = numbers.get("num_key_value_heads")
    if heads and shared is not None and (shared < 1 or numbers[heads] % shared):
        yield Problem(f"{where}.num_key_value_heads", f"{shared}", f"a divisor of {heads}, {numbers[heads]}")
    projected = (
        "caption_projection_dim",
        *(["cross_attention_dim"] if "caption_channels" in numbers else []),
    )  # else the text's own
    for inner in projected if "attention_head_dim" in numbers and heads else ():
        product = numbers[heads] * numbers.get("attention_head_dim", 1)
        if inner in numbers and numbers[inner] != product:
            yield Problem(f"{where}.{inner}", f"{numbers[inner]}", f"{heads} x attention_head_dim, {product}")


def not_numbers(value: Any, where: str) -> Iterator[Problem]:
    """NaN, wherever it stands."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from not_numbers(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from not_numbers(item, f"{where}[{index}]")
    elif isinstance(value, float) and math.isnan(value):
        yield Problem(where, "nan", "a number")


def check_depth(text: str, where: str) -> None:
    """Refuse text that is nested deeper than any experiment, before a parser follows it.

    Raises:
        UserError: it is.
    """
    depth = deepest = 0
    for character in re.findall(r"[\[{\]}]", text):
        depth += 1 if character in "[{" else -1
        deepest = max(deepest, depth)
    indents = max((len(indent) for indent in re.findall(r"^[\s\-?:]*", text, re.M)), default=0)
    if deepest > MAX_DEPTH or indents > 8 * MAX_DEPTH:
        raise UserError(where, f"text nested {max(deepest, indents // 2):,} levels deep", f"at most {MAX_DEPTH} levels")
