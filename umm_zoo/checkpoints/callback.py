"""Callback that saves the checkpoints from which a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from umm_zoo.checkpoints.folder import CheckpointFolder
from umm_zoo.checkpoints.saving import finish, look, save


class LastCheckpoint(Checkpoint):
    """Callback that saves every so many steps and at the end, always right after a training batch, and keeps the newest few.

    Lightning's ``ModelCheckpoint`` would also save after a validation and at the end of an epoch. A run continued from the end of
    an epoch starts a new one, with a new iterator and other random numbers: it is no longer the run that was not interrupted.
    ``keep`` counts the newest; ``folder`` is ``checkpoints`` in the run folder where it is None.
    """

    def __init__(self, every_n_train_steps: int, keep: int = 2, folder: str | Path | None = None) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps: found {every_n_train_steps}, expected 1 or more")
        self.every_n_train_steps = every_n_train_steps
        self.checkpoints = CheckpointFolder(folder or "checkpoints", keep)
        self._placed = folder is not None
        self._saved_step = 0  # no need to save what has taken no step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        if not self._placed:
            self.checkpoints.path = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint that a run is resumed from exists already."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Save every so many steps, and after the last one; what the writing of an earlier one has met ends the run."""
        look(trainer)
        step = trainer.global_step
        if step % self.every_n_train_steps == 0 or step == trainer.max_steps:
            self._save_if_new(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what a run that ended before ``max_steps`` has reached, and wait until it stands."""
        self._save_if_new(trainer)
        finish(trainer)

    def _save_if_new(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved_step:  # gradients may be accumulating
            save(trainer, self.checkpoints, behind=True)
            self._saved_step = trainer.global_step
