"""Ctrl-C, SIGTERM and a cluster's warning: finish the batch, save, stop."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from umm_zoo.checkpoints.folder import CheckpointFolder
from umm_zoo.checkpoints.saving import save
from umm_zoo.training.ranks import answering


class Stopped(Exception):  # noqa: N818 - not an error
    """Training was asked to stop.

    Args:
        signum: the signal that asked.
        step: optimiser steps taken.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(signum, step)
        self.signum, self.step = signum, step
        self.checkpoint: Path | None = None  # what has been saved on the way out
        self.requeued: str | None = None  # the SLURM job that will go on

    def __str__(self) -> str:
        going_on = f"SLURM job {self.requeued} is requeued and goes on" if self.requeued else "continue with ckpt=last"
        return f"stopped by {signal.Signals(self.signum).name} at step {self.step}; saved {self.checkpoint}; {going_on}"

    @property
    def code(self) -> int:
        """Exit code of the command."""
        return 128 + self.signum


class StopOnSignal(Callback):
    """Saves a checkpoint after the optimiser step in which SIGINT or SIGTERM arrived, then raises ``Stopped`` on every rank.

    Under SLURM the signal with which the cluster warns that a job's time is running out (``sbatch --signal=USR1@120``; another one
    by Lightning's ``SLURMEnvironment(requeue_signal=…)``) does the same and has the job requeued.

    Lightning's own handling does not save, and broadcasts from inside the signal handler, which can hang beside a collective.
    A second Ctrl-C interrupts at once, without saving. During validation the checkpoint is that of the training batch before it;
    several ranks finish the validation first.

    Args:
        checkpoints: where to.
    """

    def __init__(self, checkpoints: CheckpointFolder) -> None:
        self.checkpoints = checkpoints
        self._received = 0
        self._requeue_signal = 0
        self._handling = ExitStack()
        self._val_progress: dict[str, Any] | None = None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received != self._requeue_signal or not self._received:  # a SIGTERM that comes after a warning changes nothing
            self._received = signum

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which has just registered its own handlers."""
        self._requeue_signal = requeue_signal(trainer)
        numbers = {signal.SIGINT, signal.SIGTERM, *filter(None, [self._requeue_signal])}
        self._handling.enter_context(answering(numbers, self._receive))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, before Lightning gives back its own, or it would be its handlers that stay."""
        self._handling.close()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop at the end of an optimiser step if any rank was asked to: half of one would count its rollouts twice."""
        self._val_progress = copy.deepcopy(trainer.fit_loop.epoch_loop.val_loop.state_dict())
        if not trainer.fit_loop._should_accumulate() and (signum := self._agreed(trainer)):
            raise Stopped(signum, trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop a validation too: it may be long. Several ranks go on to its end, for they cannot ask each other in the middle: one
        may have a batch more than another, and its question would meet the other's metrics."""
        if self._received and trainer.world_size == 1:
            raise Stopped(self._received, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save; callbacks that exchange the weights for a validation stand before this one, and have put them back."""
        if isinstance(exception, Stopped):
            if self._val_progress is None:  # in the validation that was due when the run was continued
                exception.checkpoint = Path(str(trainer.ckpt_path))
            else:
                if trainer.validating:  # half a validation cannot be continued: its metrics would be partial
                    trainer.fit_loop.epoch_loop.val_loop.load_state_dict(self._val_progress)
                exception.checkpoint = save(trainer, self.checkpoints)
            if exception.signum and exception.signum == self._requeue_signal and trainer.is_global_zero:
                exception.requeued = requeue()
        self._handling.close()

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that reached any rank, 0 for none."""
        if trainer.world_size == 1:
            return self._received
        return int(trainer.strategy.reduce(torch.tensor(self._received, device=trainer.strategy.root_device), reduce_op="max"))


def requeue_signal(trainer: Trainer) -> int:
    """The signal after which this SLURM job is to be requeued, 0 where there is no such job."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        return int(environment.requeue_signal or 0) if environment.auto_requeue else 0
    return int(signal.SIGUSR1) if slurm_job() else 0


def slurm_job() -> str | None:
    """The SLURM job that this process belongs to, as ``scontrol`` names it; None in an interactive one."""
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    job = os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"[0-9_]+", job) else None


def requeue() -> str | None:
    """Ask SLURM to run this job again; returns its name, None (and says why) where it refuses."""
    job = slurm_job()
    if job is None:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
        problem = (done.stderr or done.stdout).strip() if done.returncode else None
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem is not None:
        print(f"SLURM job {job} could not be requeued: {problem}", flush=True)
        return None
    return job
