"""Ctrl-C and SIGTERM: finish the batch, save, stop."""

from __future__ import annotations

import copy
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer


class Stopped(Exception):  # noqa: N818 - not an error
    """Training was asked to stop.

    Args:
        signum: the signal that asked.
        checkpoint: what is saved on the way out.
        step: optimiser steps that it holds.
    """

    def __init__(self, signum: int, checkpoint: Path, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}; saved {checkpoint}")
        self.signum, self.checkpoint, self.step = signum, checkpoint, step


class StopOnSignal(Callback):
    """Saves ``checkpoint`` after the batch in which SIGINT or SIGTERM arrived, then raises ``Stopped`` on every rank.

    Lightning's own handling does not save, and broadcasts from inside the signal handler, which can hang beside a collective.
    A second Ctrl-C interrupts at once, without saving. During validation the checkpoint is that of the training batch before it;
    several ranks finish the validation first.

    Args:
        checkpoint: file to write.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._received = 0
        self._before: dict[int, Any] = {}
        self._val_progress: dict[str, Any] = {}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signum

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which has just registered its own handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        """Before Lightning gives back its own, or it would be its handlers that stay."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop here if any rank was asked to."""
        self._val_progress = copy.deepcopy(trainer.fit_loop.epoch_loop.val_loop.state_dict())
        if signum := self._agreed(trainer):
            raise Stopped(signum, self.checkpoint, trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop a validation too: it may be long. Several ranks go on to its end, for they cannot ask each other in the middle: one
        may have a batch more than another, and its question would meet the other's metrics."""
        if self._before and self._received and trainer.world_size == 1:
            raise Stopped(self._received, self.checkpoint, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save; callbacks that exchange the weights for a validation stand before this one, and have put them back."""
        if isinstance(exception, Stopped):
            if trainer.validating:  # half a validation cannot be continued: its metrics would be partial
                trainer.fit_loop.epoch_loop.val_loop.load_state_dict(self._val_progress)
            trainer.save_checkpoint(self.checkpoint)
        self._give_back()

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that reached any rank, 0 for none."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return self._received
        signum = torch.tensor([self._received], device=trainer.strategy.root_device)
        dist.all_reduce(signum, op=dist.ReduceOp.MAX)
        return int(signum.item())
