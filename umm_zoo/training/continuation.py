"""What is due at the moment of a checkpoint, so that a run that goes on from it ends with the same scores."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from umm_zoo.training.log import MetricsLog
from umm_zoo.training.record import RunRecord
from umm_zoo.training.report import scores


class Continuation(Callback):
    """Keeps in every checkpoint the scores so far, the length of the log, and what the step has yet to do: its row, its validation.

    A checkpoint is written at the end of a training batch: before the batch is logged, and before the validation that may follow.
    A resumed run logs and validates first. It does so too where the run that was stopped had got further: callbacks that judge
    validations (``EarlyStopping``) go on from the checkpoint, which has not seen it, and it comes out the same.
    """

    def __init__(self) -> None:
        self._batch_ended = False  # and neither logged nor validated yet
        self._validated = False
        self._loaded: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """From here on a checkpoint is of the end of this batch."""
        self._batch_ended = True

    def on_train_batch_start(self, *_: Any) -> None:
        """The batch before has been logged and validated on."""
        self._batch_ended = self._validated = False

    def on_validation_start(self, *_: Any) -> None:
        """The batch before has been logged."""
        self._batch_ended = False

    def on_validation_end(self, *_: Any) -> None:
        """Its scores have been logged."""
        self._validated = True

    def on_train_epoch_end(self, *_: Any) -> None:
        """The batch before has been logged."""
        self._batch_ended = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add it under the key ``continuation``."""
        log, row = _log_of(trainer), None
        loop = trainer.fit_loop.epoch_loop
        validates = trainer.validating and not self._validated
        if self._batch_ended:
            validates = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
            connector = trainer._logger_connector
            if connector.should_update_logs and not loop._should_accumulate():
                row = {"epoch": trainer.current_epoch, **_plain(connector.metrics["log"])}
        if log is not None:
            log.sync()
        checkpoint["continuation"] = {
            "validates": bool(validates),
            "row": row,
            "epoch": trainer.current_epoch,
            "log_step": loop._batches_that_stepped,
            "rows": None if log is None else log.num_rows,
            "scores": _plain(trainer._logger_connector._callback_metrics) if trainer.validating else scores(trainer),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts; a checkpoint of an earlier version does not say, so it is validated."""
        self._loaded = {"validates": True, "row": None, "rows": None, "scores": {}, **checkpoint.get("continuation", {})}

    @property
    def due(self) -> bool:
        """Whether a checkpoint has been loaded and nothing been done about it yet."""
        return self._loaded is not None

    def begin(self, trainer: Trainer) -> None:
        """Put the log back to where the checkpoint was made, and do what was due there."""
        if self._loaded is None:
            return
        loaded, self._loaded = self._loaded, None
        connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
        connector._callback_metrics.update({name: torch.tensor(value) for name, value in loaded["scores"].items()})
        if (log := _log_of(trainer)) is not None:
            log.rewind(trainer.global_step, loaded["rows"])
            if loaded["row"] is not None:
                log.log_metrics(loaded["row"], loaded["log_step"])
        if loaded["validates"] and trainer.enable_validation:
            progress = trainer.fit_loop.epoch_progress.current
            now, progress.completed = progress.completed, loaded.get("epoch", progress.completed)  # past its end it counts on
            trainer.validating = True
            loop.val_loop.restarting = False
            loop.val_loop.run()
            trainer.training = True
            progress.completed = now


class ContinuedFitLoop(_FitLoop):
    """Lightning's loop, which also does what was due at the checkpoint; where no step is left, that is all."""

    @classmethod
    def install(cls, trainer: Trainer, record: RunRecord, continuation: Continuation) -> None:
        """Let ``trainer`` use it."""
        loop = cls(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
        loop.epoch_loop = trainer.fit_loop.epoch_loop
        loop.record, loop.continuation = record, continuation
        trainer.fit_loop = loop

    record: RunRecord
    continuation: Continuation

    @property
    def skip(self) -> bool:
        """Never where something is due."""
        return super().skip and not self.continuation.due

    def setup_data(self) -> None:
        """Open the loader of a resumed run, which may shuffle, with the random numbers of the checkpoint."""
        if self.continuation.due:
            self.record.restore(self.trainer)
        super().setup_data()

    def on_run_start(self) -> None:
        """Once every callback is ready."""
        super().on_run_start()
        self.continuation.begin(self.trainer)


def _log_of(trainer: Trainer) -> MetricsLog | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, MetricsLog)), None)


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
