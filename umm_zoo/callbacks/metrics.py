"""Callback that scores a method while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import rich
import torch
from lightning import Callback, LightningModule, Trainer
from rich.table import Table
from torchmetrics import Metric

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.outputs import ON_REQUEST, Outputs


class MetricCallback(Callback):
    """Callback that gives validation outputs to metrics and logs ``<prefix>/<name>`` or ``<prefix>/<name>/<entry>``.

    The metrics live here and never on the LightningModule, where a metric's networks would leak into every checkpoint. Values are
    exact over ranks: torchmetrics adds up the states, nothing is averaged per batch or per rank. A value that is not a number (no
    row of that kind was seen) is not logged. Lightning's sanity check is not scored.

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
        self.values = {}
        for name, metric in self.metrics.items():
            for entry, value in entries(metric.compute()):
                self.values["/".join(filter(None, (self.prefix, name, entry)))] = float(value)
            metric.reset()
        for key, number in self.values.items():
            if number == number:  # NaN: nothing of that kind was seen
                # The value is already the same on every rank; "max" keeps it bit for bit where a mean would round it, and tells
                # Lightning, which warns otherwise, that ranks agree.
                pl_module.log(key, torch.tensor(number), on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)
        if self.show_table and trainer.is_global_zero and self.values:
            rich.print(self._table(trainer.global_step))

    def _table(self, step: int) -> Table:
        table = Table(title=f"{self.prefix}, step {step}", title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for key, number in self.values.items():
            table.add_row(key.removeprefix(f"{self.prefix}/"), "-" if number != number else f"{number:.4g}")
        return table


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """(entry, value) of what a metric computed: a scalar has one entry without a name."""
    if isinstance(value, Mapping):
        yield from value.items()
    else:
        yield "", value
