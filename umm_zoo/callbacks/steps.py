"""Callbacks of whole optimiser steps, however many micro-batches each is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StepCallback(Callback, ABC):
    """Base class of callbacks that act behind an optimiser step, and not while gradients are being accumulated."""

    _seen_step = 0

    @abstractmethod
    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act behind the last micro-batch of a step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step to act behind is still to come."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look whether a step has been taken."""
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self.on_step_end(trainer, pl_module)
