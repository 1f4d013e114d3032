"""Callbacks of validation: how much a method makes there, and the scores of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Column, Table
from torchmetrics import Metric

from umm_zoo.batch import Batch
from umm_zoo.errors import Natural, UserError, printable
from umm_zoo.method import Method
from umm_zoo.outputs import ON_REQUEST, Outputs, Wanted


class Validation(Callback):
    """Callback that sets how much a method makes at each validation; nothing of it touches training.

    Args:
        max_new_tokens: longest answer; 0 makes none.
        num_generated_batches: batches of each validation whose images are generated; None is all.

    Raises:
        ValueError: a number is negative.
    """

    def __init__(self, max_new_tokens: Natural = Wanted.max_new_tokens, num_generated_batches: Natural | None = None) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("num_generated_batches", num_generated_batches or 0)):
            if value < 0:
                raise ValueError(f"Validation.{name}: found {value}, expected 0 or more")
        self.max_new_tokens, self.num_generated_batches = max_new_tokens, num_generated_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set it in the method."""
        if isinstance(pl_module, Method):
            longest, batches = self.max_new_tokens, self.num_generated_batches
            pl_module.wanted = replace(pl_module.wanted, max_new_tokens=longest, num_generated_batches=batches)


class MetricCallback(Callback):
    """Callback that gives validation outputs to metrics and logs ``<prefix>/<name>`` or ``<prefix>/<name>/<entry>``.

    The metrics live here and never on the LightningModule, where a metric's networks would leak into every checkpoint. Values are
    exact over ranks: torchmetrics adds up the states, nothing is averaged per batch or per rank. A value that is not a number is
    not logged; the table says that no row was counted, and ``unscored`` names it. Lightning's sanity check is not scored.

    ``validation_step`` of the method must return ``Outputs``; what each metric reads of them, the metric says.

    Args:
        metrics: by the name they are logged under.
        prefix: first part of every logged name.
        show_table: print the values on rank 0 after each validation.

    Raises:
        TypeError: a value of ``metrics`` is no ``torchmetrics.Metric``.
    """

    def __init__(self, metrics: dict[str, Metric], prefix: str = "val", show_table: bool = True) -> None:
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise TypeError(f"metrics.{name}: found a {type(metric).__name__}, expected a torchmetrics.Metric")
        self.metrics, self.prefix, self.show_table = dict(metrics), prefix, show_table
        self.values: dict[str, float] = {}  # of the last validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Request what a method makes only where a metric reads it."""
        if isinstance(pl_module, Method):
            read = {name for metric in self.metrics.values() for name in getattr(metric, "reads", ())}
            pl_module.wanted = replace(pl_module.wanted, on_request=pl_module.wanted.on_request | ON_REQUEST & read)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move to the model's device and forget what an interrupted validation left."""
        for metric in self.metrics.values():
            metric.to(pl_module.device)
            metric.reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update every metric.

        Raises:
            UserError: ``validation_step`` returned something else than ``Outputs``.
        """
        if trainer.sanity_checking:
            return
        if not isinstance(outputs, Outputs):
            what = f"validation_step of {type(pl_module).__name__} returned a {type(outputs).__name__}, expected Outputs"
            raise UserError("method", what)
        for metric in self.metrics.values():
            metric.update(outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute over all ranks, log, reset."""
        if trainer.sanity_checking:
            return
        self.values = {
            key: number
            for name, metric in self.metrics.items()
            for key, number in logged(self.prefix, name, or_nan(metric.compute())).items()
        }
        for scored in self.metrics.values():
            scored.reset()
        for key, number in self.values.items():
            if number == number:
                # The value is already the same on every rank; "max" keeps it bit for bit where a mean would round it, and tells
                # Lightning, which warns otherwise, that ranks agree.
                pl_module.log(key, torch.tensor(number), on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)
        if self.show_table and trainer.is_global_zero and self.values:
            shown = {key.removeprefix(f"{self.prefix}/"): number for key, number in self.values.items()}
            print_scores(f"{self.prefix}, step {trainer.global_step}", shown)

    def unscored(self) -> dict[str, float]:
        """The values of the last validation that are not a number, for they count no row."""
        return {key: number for key, number in self.values.items() if number != number}


def logged(prefix: str, name: str, computed: Any) -> dict[str, float]:
    """What a metric computed, by the names it is logged under: ``<prefix>/<name>`` for a scalar, and one entry more for a map."""
    entries = computed if isinstance(computed, Mapping) else {"": computed}
    return {"/".join(filter(None, (prefix, name, entry))): float(value) for entry, value in entries.items()}


def or_nan(computed: Any) -> Any:
    """What a metric computed, and NaN in place of the empty map of one that counted no row."""
    return math.nan if isinstance(computed, Mapping) and not computed else computed


def print_scores(title: str, scores: Mapping[str, float]) -> None:
    """Print a table of scores, with a note at those that are not a number."""
    table = Table("metric", Column("value", justify="right"), title=printable(title), title_justify="left")
    for name, value in scores.items():
        table.add_row(printable(name), "nan (no row counted)" if value != value else f"{value:.4g}")
    Console(markup=False).print(table)
