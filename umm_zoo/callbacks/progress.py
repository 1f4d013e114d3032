"""Progress of a run: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from umm_zoo.batch import Batch
from umm_zoo.errors import lasting, say

#: Seconds between two lines in a file.
INTERVAL = 30.0


def progress_of_run(every: int) -> ProgressBar:
    """A bar where the output is a terminal that can show one, else lines.

    Args:
        every: optimiser steps between two validations; 0 where they are not counted in steps.
    """
    can_draw = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return Progress(every, refresh_rate=5) if can_draw else ProgressLines(every)


class Pace:
    """Steps and images per second since the last asking; the time of validations is left out."""

    def __init__(self) -> None:
        self.steps = self.images = 0
        self._began = time.monotonic()
        self._paused: float | None = None

    def count(self, batch: Any, steps: int) -> None:
        """One more batch, and so many updates."""
        self.steps += steps
        self.images += len(batch.images) + len(batch.requested) if isinstance(batch, Batch) and not batch.stands_in else 0

    def pause(self) -> None:
        """Stop the clock."""
        self._paused = time.monotonic()

    def go_on(self) -> None:
        """Let it run again."""
        if self._paused is not None:
            self._began += time.monotonic() - self._paused
            self._paused = None

    @property
    def seconds(self) -> float:
        """Since the start, without pauses."""
        return max((self._paused or time.monotonic()) - self._began, 1e-9)


def next_validation(trainer: Trainer, every: int) -> int | None:
    """Its step; None where there is none, or nobody knows."""
    due = (trainer.global_step // every + 1) * every if every else 0
    return due if due and (trainer.max_steps < 0 or due <= trainer.max_steps) else None


class ProgressLines(ProgressBar):
    """A line with step, loss, images per second, time left and the next validation, every ``interval`` seconds; rank 0 alone.

    For what is read later: no control characters, nothing but ASCII.

    Args:
        every: optimiser steps between two validations; 0 where they are not counted in steps.
        interval: seconds.
    """

    def __init__(self, every: int = 0, interval: float = INTERVAL) -> None:
        super().__init__()
        self.every, self.interval = every, interval
        self._pace, self._whole = Pace(), Pace()
        self._step = 0

    def enable(self) -> None:
        """Nothing: rank 0 alone says its lines."""

    def disable(self) -> None:
        """Nothing: see ``enable``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._pace, self._whole, self._step = Pace(), Pace(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count, and say a line where one is due."""
        done, self._step = trainer.global_step - self._step, trainer.global_step
        for pace in (self._pace, self._whole):
            pace.count(batch, done)
        if trainer.is_global_zero and self._pace.seconds >= self.interval:
            say(self.line(trainer))
            self._pace = Pace()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pace.pause()
        self._whole.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._pace.go_on()
        self._whole.go_on()

    def line(self, trainer: Trainer) -> str:
        """What is said of the last interval."""
        step, whole, loss = trainer.global_step, trainer.max_steps, trainer.callback_metrics.get("loss")
        words = [f"step {step}/{whole}" if whole > 0 else f"step {step}"]
        words += [] if loss is None else [f"loss {float(loss):.4g}"]
        words += [f"{self._pace.images / self._pace.seconds:.3g} images/s"] if self._pace.images else []
        if whole > 0 and self._whole.steps:
            words.append(f"{lasting((whole - step) * self._whole.seconds / self._whole.steps)} left")
        words += [f"validation at {due}"] if (due := next_validation(trainer, self.every)) else []
        return ", ".join(words)


class Progress(RichProgressBar):
    """Lightning's rich bar for runs that are counted in steps: no endless epoch and no version number in it.

    Args:
        every: optimiser steps between two validations; 0 where they are not counted in steps.
        refresh_rate: batches between two updates of the bar.
    """

    def __init__(self, every: int = 0, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.every, self._pace = every, Pace()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count."""
        self._pace.count(batch, 0)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pace.pause()
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._pace.go_on()
        super().on_validation_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._pace = Pace()
        super().on_train_start(trainer, pl_module)

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the whole run, as the bar counts those of before a resumption too (Lightning takes them off the total)."""
        trainer = self.trainer
        if trainer.max_epochs == -1 and trainer.max_steps > 0:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.completed  # some with another accumulation, after a resume
            rest = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
            return min(trainer.num_training_batches, done + rest)
        return trainer.num_training_batches

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """The values behind the bar."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if self._pace.images:
            items["images/s"] = f"{self._pace.images / self._pace.seconds:.3g}"
        if due := next_validation(trainer, self.every):
            items["validation at"] = str(due)
        return items

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs is None or self.trainer.max_epochs < 0:
            return "training"
        description: str = super()._get_train_description(current_epoch)
        return description
