"""``trainer.max_time``: stop between two optimiser steps, save, and say how to go on."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from umm_zoo.checkpoints.files import describe
from umm_zoo.training.signals import Stopped


class TimeIsUp(Stopped):
    """The time of ``trainer.max_time`` has been used; nothing is wrong, and the run has not finished.

    Args:
        limit: the time.
        step: optimiser steps taken.
    """

    def __init__(self, limit: timedelta, step: int) -> None:
        super().__init__(0, step)
        self.limit = limit

    def __str__(self) -> str:
        found = f"stopped at step {self.step}: the time of trainer.max_time, {self.limit}, is used up"
        return f"{found}; saved {self.checkpoint}; ckpt=last with a larger trainer.max_time goes on"

    @property
    def code(self) -> int:
        """Exit code of the command."""
        return 0


class TimeLimit(Timer):
    """Lightning's timer, which keeps the time used in checkpoints, as a stop like that of a signal.

    Lightning itself ends the epoch and the training as if nothing were left to do: a run continued from there is another run.

    Args:
        max_time: days:hours:minutes:seconds, or a map of ``timedelta``'s arguments; training and its validations count.
    """

    def __init__(self, max_time: str | dict[str, int]) -> None:
        super().__init__(max_time, verbose=False)

    @property
    def state_key(self) -> str:
        """Lightning's own, so that its checkpoints are read."""
        return "Timer"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Look at the clock after a whole step that is not the last one anyway."""
        loop = trainer.fit_loop
        last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (loop.max_epochs or 0)
        last = trainer.global_step == trainer.max_steps or (trainer.is_last_batch and last_epoch)
        if not last and not loop._should_accumulate() and loop._can_stop_early:
            super().on_train_batch_end(trainer, pl_module, *rest)

    def _check_time_remaining(self, trainer: Trainer) -> None:
        remaining = self.time_remaining()
        if trainer.strategy.broadcast(remaining is not None and remaining <= 0):
            limit = timedelta(seconds=self._duration or 0)
            begun = self.start_time() is not None or trainer.ckpt_path is None  # else nothing was left at the start
            raise TimeIsUp(limit, trainer.global_step if begun else int(describe(str(trainer.ckpt_path)).get("global_step", 0)))
