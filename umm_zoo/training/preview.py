"""``fit --check``: what an experiment would train, how much memory that takes at least, and the file with everything filled in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import nn

from umm_zoo.backbones.quantized import stored_as, stored_bytes
from umm_zoo.errors import UserError, locating, printable
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import Experiment, earlier_stages
from umm_zoo.method import Method
from umm_zoo.training.changes import Changes
from umm_zoo.training.dry_step import try_step
from umm_zoo.training.memory import activation_bytes, autocast_bytes, counting
from umm_zoo.training.run_folder import RunFolder
from umm_zoo.training.setup import Built, build_experiment, check_data
from umm_zoo.training.trial import try_experiment


def print_check(experiment: Experiment, runs: str | None = None, ckpt: str | None = None) -> None:
    """Check, build on the meta device (no memory, no weights read), and print the report.

    Missing shards are a warning here and an error in ``fit``: an experiment of paper size can be checked on a laptop.

    Raises:
        UserError: the experiment is wrong.
    """
    for stage in earlier_stages(experiment):
        check(stage)
    check(experiment)
    folder = RunFolder.of(experiment, runs)
    if file := next((place for place in (folder.path, *folder.path.parents) if place.exists() and not place.is_dir()), None):
        raise UserError(file, "a file", "a folder for the run folders", "--runs DIR names another")
    if ckpt:
        resume = folder.resume_path(ckpt, experiment.file)
        with locating(f"{experiment.file}: ckpt"):
            Changes.since(resume, experiment)
    with torch.device("meta"):
        built = build_experiment(experiment)
        with locating(experiment.file):
            built.method.configure_optimizers()
    built.method.to("meta")  # what says its sizes in its weights alone has read them
    with counting(built.method) as numbers:
        try_experiment(built.method, built.data, experiment.file)
    _check_shares(built.data, experiment)
    console = Console(soft_wrap=False, width=None if Console().is_terminal else 120, markup=False)
    console.print(_parameter_table(experiment, built.method))
    warnings = _data_warnings(built, experiment)
    for line in _memory_lines(built, experiment, numbers, has_data=not warnings):
        console.print(line, highlight=False)
    for line in warnings:
        console.print(f"warning: {line}", highlight=False, soft_wrap=True, style="yellow")
    console.print(printable(f"run folder: {folder.path}"), highlight=False, soft_wrap=True)
    console.print("the experiment with everything filled in:", highlight=False)
    console.print(Syntax(experiment.to_yaml(), "yaml", background_color="default", word_wrap=True))


def _check_shares(data: Any, experiment: Experiment) -> None:
    """Let a data module that is shared out over ranks say whether it can be, where the experiment says over how many."""
    given = experiment.trainer
    devices = given.get("devices", 1)
    if callable(check_shares := getattr(data, "check_shares", None)) and isinstance(devices, int) and devices > 0:
        with locating(experiment.file):
            check_shares(devices * given.get("num_nodes", 1), given.get("accumulate_grad_batches", 1))


def _parameter_table(experiment: Experiment, method: Method) -> Table:
    table = Table(title=printable(f"{experiment.name}: {type(method).__name__}"), title_justify="left")
    table.add_column("part")
    for column in ("trained", "frozen", "weights"):
        table.add_column(column, justify="right")
    rows = {name: list(part.parameters()) for name, part in method.all_parts().items()}
    for name, parameters in rows.items():
        table.add_row(printable(name), *_counts(parameters))
    table.add_section()
    table.add_row("all", *_counts(p for parameters in rows.values() for p in parameters))
    return table


def _counts(parameters: Iterable[nn.Parameter]) -> tuple[str, str, str]:
    parameters = list(parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    return f"{trained:,}", f"{frozen:,}", _bytes(sum(map(stored_bytes, parameters)))


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


def _memory_lines(built: Built, experiment: Experiment, numbers: Mapping[int, int], has_data: bool) -> list[str]:
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
    detail = ", ".join(f"{name} {_bytes(size)}" for name, size in by_type.most_common())
    least = [
        f"memory, at least: {_bytes(weights + trained)} per process",
        f"  weights and buffers {_bytes(weights + waiting)} ({detail or 'none'})",
        *([f"  less {_bytes(waiting)}: {', '.join(away)} wait on the CPU, the largest is counted for its calls"] if away else []),
        f"  gradients of the trained parameters, and what {type(optimizer).__name__} keeps of them, {_bytes(trained)}",
    ]
    copies = autocast_bytes(method, precision)  # before the trial, which casts the weights
    activations, how = 0, "by a trial step without numbers on the first rows of the data"
    rule = _by_rule(built, numbers, rows, precision)
    if has_data and rows:
        activations = try_step(method, built.data, rows, precision)
    if not activations:
        activations, how = rule, "by rule of thumb"
    uncounted = "what a library works with, and an allocator leaves unused; sharded strategies need less"
    if not activations:
        return [*least, f"  not counted: activations, {uncounted}"]
    return [
        *least,
        f"memory, about: {_bytes(weights + trained + activations + copies)} per process",
        f"  activations of {rows} rows, {how}: {_bytes(activations)}",
        *([f"  16-bit copies of float32 weights that autocast keeps: {_bytes(copies)}"] if copies else []),
        f"  not counted: {uncounted}",
    ]


def _data_warnings(built: Built, experiment: Experiment) -> list[str]:
    try:
        check_data(built.data, experiment.file)
    except UserError as error:
        return [f"{line} (fit will refuse this)" for line in error.lines()]
    return []


def _held(part: nn.Module) -> int:
    return sum(map(stored_bytes, part.parameters()))


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError
