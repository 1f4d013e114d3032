"""The checkpoint that a run is continued from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` in ``folder``: every so many steps and at the end, always right after a training batch.

    Lightning's ``ModelCheckpoint`` would also write it after a validation and at the end of an epoch. A run continued from the end
    of an epoch starts a new one, with a new iterator and other random numbers: it is no longer the run that was not interrupted.

    Args:
        folder: where to.
        every_n_train_steps: optimiser steps between two savings.
    """

    def __init__(self, folder: str | Path, every_n_train_steps: int) -> None:
        super().__init__(
            dirpath=folder,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Save every so many steps, and after the last one."""
        super().on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step == trainer.max_steps:
            self._save_if_new(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: see above."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: see above."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what a run that ended before ``max_steps`` has reached."""
        self._save_if_new(trainer)

    def _save_if_new(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
