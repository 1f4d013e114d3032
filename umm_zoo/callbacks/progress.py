"""The progress bar of a run."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's rich bar for runs that are counted in steps: no endless epoch and no version number in it."""

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
        return items

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs is None or self.trainer.max_epochs < 0:
            return "training"
        description: str = super()._get_train_description(current_epoch)
        return description
