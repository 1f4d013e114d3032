"""``fit --check``: what an experiment would train, how much memory that takes at least, and the file with everything filled in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import nn

from umm_zoo.backbones.quantized import stored_bytes
from umm_zoo.errors import UserError, locating, printable
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import Experiment, earlier_stages
from umm_zoo.method import Method
from umm_zoo.training.changes import Changes
from umm_zoo.training.estimate import as_bytes, choose_checkpointing, estimate
from umm_zoo.training.memory import counting
from umm_zoo.training.recomputation import recompute
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
    chosen = []
    if experiment.training.get("checkpointing") == "auto":
        every, line = choose_checkpointing(experiment)
        recompute(built.method, every)
        chosen = [line]
    with counting(built.method) as numbers:
        try_experiment(built.method, built.data, experiment.file)
    _check_shares(built.data, experiment)
    console = Console(soft_wrap=False, width=None if Console().is_terminal else 120, markup=False)
    console.print(_parameter_table(experiment, built.method))
    warnings = _data_warnings(built, experiment)
    for line in [*chosen, *estimate(built, experiment, numbers, has_data=not warnings).lines]:
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
    return f"{trained:,}", f"{frozen:,}", as_bytes(sum(map(stored_bytes, parameters)))


def _data_warnings(built: Built, experiment: Experiment) -> list[str]:
    try:
        check_data(built.data, experiment.file)
    except UserError as error:
        return [f"{line} (fit will refuse this)" for line in error.lines()]
    return []
