"""Estimate of the memory of a training, part by part, and the activation checkpointing that it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from umm_zoo.backbones.quantized import stored_as, stored_bytes
from umm_zoo.errors import locating
from umm_zoo.experiment.file import Experiment
from umm_zoo.training.compilation import refuse_idle
from umm_zoo.training.dry_step import try_step
from umm_zoo.training.memory import activation_bytes, autocast_bytes, counting
from umm_zoo.training.recomputation import CHOICES, device_bytes, fits, in_words, recompute
from umm_zoo.training.setup import Built, build_experiment
from umm_zoo.training.trial import try_experiment


class Estimate(NamedTuple):
    """Bytes per process: what stands there all the time, what a step adds (0 where nothing is known of it), and both in words."""

    standing: int
    step: int
    lines: list[str]


def _rows(data: Any, experiment: Experiment) -> int:
    """Rows of a micro-batch of one process; 0 where the data module does not say."""
    given, rows = experiment.trainer, getattr(data, "batch_size", 0)
    if not isinstance(rows, int):
        return 0
    devices, nodes = (given.get(name, 1) if isinstance(given.get(name, 1), int) else 1 for name in ("devices", "num_nodes"))
    return -(-rows // max(1, devices * nodes * given.get("accumulate_grad_batches", 1)))


def _by_rule(built: Built, numbers: Mapping[int, int], rows: int, precision: str) -> int:
    """Bytes of activations by rule of thumb; 0 where the data module does not say of which sizes its images are."""
    shapes = getattr(getattr(built.data, "transform", None), "shapes", None)
    if shapes is None:
        return 0
    sizes = [(height, width) for (width, height), _ in shapes()]
    return activation_bytes(built.method, numbers, sizes, rows, precision)


def estimate(built: Built, experiment: Experiment, numbers: Mapping[int, int], has_data: bool) -> Estimate:
    """For a method on the meta device; ``numbers`` of its layers, see ``counting``.

    Raises:
        UserError: a part is to be compiled that the step tried here does not run.
    """
    method, rows, precision = built.method, _rows(built.data, experiment), str(experiment.trainer.get("precision", 32))
    by_type: Counter[str] = Counter()
    for tensor in {id(t): t for t in [*method.parameters(), *method.buffers()]}.values():
        by_type[stored_as(tensor)] += stored_bytes(tensor)
    optimizer = None if built.setup is None else built.setup.optimizer
    learning = [p for p in method.parameters() if p.requires_grad]
    trained = sum(map(stored_bytes, learning)) + (0 if optimizer is None else round(sum(map(optimizer.state_bytes, learning))))
    away = {name: _held(method.all_parts()[name]) for name in (built.setup.offload if built.setup else ())}
    waiting = sum(away.values()) - max(away.values(), default=0)
    weights = sum(by_type.values()) - waiting
    detail = ", ".join(f"{name} {as_bytes(size)}" for name, size in by_type.most_common())
    least = [
        f"memory, at least: {as_bytes(weights + trained)} per process",
        f"  weights and buffers {as_bytes(weights + waiting)} ({detail or 'none'})",
        *([f"  less {as_bytes(waiting)}: {', '.join(away)} wait on the CPU, the largest is counted for its calls"] if away else []),
        f"  gradients of the trained parameters, and what {type(optimizer).__name__} keeps of them, {as_bytes(trained)}",
    ]
    strategy = experiment.trainer.get("strategy")
    narrow = isinstance(strategy, Mapping) and strategy.get("gathered") is not None  # what is gathered is no copy
    copies = 0 if narrow else autocast_bytes(method, precision)  # before the trial, which casts the weights
    activations, how = 0, "by a trial step without numbers on the first rows of the data"
    rule = _by_rule(built, numbers, rows, precision)
    if has_data and rows:
        compilation = built.setup and built.setup.compilation
        with compilation.idle(method) if compilation else nullcontext(set[str]()) as idle:
            activations = try_step(method, built.data, rows, precision)
        with locating(experiment.file):
            refuse_idle(idle if activations else ())  # of a step that could not be tried nothing is known
    if not activations:
        activations, how = rule, "by rule of thumb"
    uncounted = "what a library works with, and an allocator leaves unused; sharded strategies need less"
    if not activations:
        return Estimate(weights + trained, 0, [*least, f"  not counted: activations, {uncounted}"])
    lines = [
        *least,
        f"memory, about: {as_bytes(weights + trained + activations + copies)} per process",
        f"  activations of {rows} rows, {how}: {as_bytes(activations)}",
        *([f"  16-bit copies of float32 weights that autocast keeps: {as_bytes(copies)}"] if copies else []),
        f"  not counted: {uncounted}",
    ]
    return Estimate(weights + trained, activations + copies, lines)


def choose_checkpointing(experiment: Experiment) -> tuple[int, str]:
    """What ``training.checkpointing: auto`` comes to on this machine, and a line that says so."""
    every, said = CHOICES[-1], "nothing is known of a step's memory"
    for choice in CHOICES:
        with torch.device("meta"):
            built = build_experiment(experiment)
        recompute(built.method.to("meta"), choice)
        with counting(built.method) as numbers:
            try_experiment(built.method, built.data, experiment.file)
        found = estimate(built, experiment, numbers, has_data=True)
        if found.step:
            every, needed = choice, found.standing // _sharers(experiment) + found.step
            said = f"about {as_bytes(needed)} of {as_bytes(device_bytes())}"
            if fits(needed):
                break
    return every, f"training.checkpointing: auto: {in_words(every)} is computed again ({said})"


def _sharers(experiment: Experiment) -> int:
    """Processes that weights, gradients and moments are shared out over."""
    given = experiment.trainer
    if not str(given.get("strategy", "")).count("FullyShardedStrategy"):
        return 1
    devices = given.get("devices", "auto")
    here = devices if isinstance(devices, int) and devices > 0 else max(1, torch.cuda.device_count())
    return int(here * given.get("num_nodes", 1))


def _held(part: nn.Module) -> int:
    return sum(map(stored_bytes, part.parameters()))


def as_bytes(size: int) -> str:
    """A size in words."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError
