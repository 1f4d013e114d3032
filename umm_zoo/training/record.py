"""State of a run that is continued exactly: its experiment, its random numbers, the time it has taken."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import umm_zoo
from umm_zoo.backbones.adapters import adapters_of
from umm_zoo.batch import Batch
from umm_zoo.checkpoints.output import NO_ROOM
from umm_zoo.checkpoints.plain_files import writing
from umm_zoo.errors import REFUSALS, UserError, note
from umm_zoo.experiment.file import Experiment
from umm_zoo.training.changes import Changes
from umm_zoo.training.places import place_of
from umm_zoo.training.run_folder import RunFolder
from umm_zoo.training.signals import Stopped


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global generators, in types that ``weights_only`` loading admits."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _of_a_class(where: str) -> bool:
    return where.partition(".")[0] in ("callbacks", "metrics", "checkpoint")


class RunRecord(Callback):
    """Writes the resolved experiment and each rank's random states into every checkpoint, and puts the states back on resume.

    Validation draws from its own seed, the same each time: scores of different steps are comparable, and a run that validates more
    often trains on the same random numbers. Ranks train on different random numbers. A data set that draws from the global
    generators of the training process itself is not covered; ``ShardData`` draws none.

    Args:
        experiment: stored under the key ``experiment`` as a plain dict.
        folder: of the run; it becomes the folder of this experiment when training begins, so that one that is refused before
            (a checkpoint that does not fit) leaves it as it was.
        changes: with which it is continued.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder | None = None, changes: Changes | None = None) -> None:
        self.experiment, self.folder, self.changes = experiment, folder, changes or Changes()
        self.owners: dict[str, Any] = {}  # callbacks, metrics and loggers by their places in the experiment
        self.began = False  # whether training has begun: what a library refuses before that is the user's
        self.keys: list[str] = []  # of the batch in work: an error in one of its rows is named by them
        self.seconds = 0.0  # of this run, over all the sessions it took
        self._clock = time.monotonic()
        self._states: list[dict[str, Any]] | None = None
        self._after_batch: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add ``experiment``, its ``history``, ``random_states`` and ``seconds``."""
        own: dict[str, Any] = self._after_batch if trainer.validating and self._after_batch else random_state()
        states: list[Any] = [own]
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, own)
        checkpoint["experiment"] = self.experiment.resolved()
        checkpoint["history"] = self.changes.history
        checkpoint["random_states"] = states
        checkpoint["seconds"] = self.elapsed()
        checkpoint["version"], checkpoint["adapters"] = umm_zoo.__version__, adapters_of(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._states = checkpoint.get("random_states")
        self.seconds = float(checkpoint.get("seconds", 0.0))
        written = checkpoint.get("version", "an earlier one")
        if trainer.is_global_zero and written != umm_zoo.__version__:
            note(f"the checkpoint is of umm_zoo {written}, this is {umm_zoo.__version__}")

    def elapsed(self) -> float:
        """Seconds of training so far, earlier sessions included."""
        return self.seconds + time.monotonic() - self._clock

    def restore(self, trainer: Trainer) -> bool:
        """Put back the random states of a checkpoint, where there are some for this rank."""
        if self._states is not None and len(self._states) != trainer.world_size:
            self._states = None
        if self._states is not None:
            set_random_state(self._states[trainer.global_rank])
        return self._states is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this rank's random states, or seed them where there are none (a fresh run, or another number of ranks)."""
        self._clock = time.monotonic()
        self.began = True
        if not self.restore(trainer):
            seed_all(self.experiment.seed + 7919 * trainer.global_rank + 104729 * trainer.global_step)
        self._after_batch = random_state()  # a validation may be due before the first batch
        if self.folder is not None and trainer.is_global_zero:
            with writing(self.folder.path):
                self.folder.begin(self.experiment, self.changes.history)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore once more: where an epoch has begun or a validation was due, Lightning has opened a loader since, which draws."""
        self.keys = batch.keys if isinstance(batch, Batch) else []
        if (batch_idx == 0 or self._states is not None) and self._after_batch is not None:
            set_random_state(self._after_batch)
        self._states = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Remember the states: a validation that follows draws numbers before its first hook."""
        self._after_batch = random_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give validation its own seed."""
        self.began = True
        seed_all(self.experiment.seed + 7919 * trainer.global_rank)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        """Remember the batch's keys."""
        self.keys = batch.keys if isinstance(batch, Batch) else []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let a user error say the experiment's file, the sample's key and how to go on."""
        if isinstance(exception, UserError):
            place = place_of(exception, self.owners) or ("data" if exception.row is not None else "")
            if place.startswith(("callbacks.", "metrics.")):  # they know their class, the experiment their name
                own = [replace(problem, where="") if _of_a_class(problem.where) else problem for problem in exception.problems]
                exception.problems = own
            exception.locate(self.experiment.file, place, self.keys, self._advice())

    def _advice(self) -> str:
        return self.folder.advice() if self.folder is not None and self.began else ""

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Around a run of the trainer: an error of a callback, metric or logger, and what a library refuses before training has
        begun, are the user's; all else is a bug.

        Raises:
            UserError: such an error.
        """
        try:
            yield
        except (UserError, Stopped):
            raise
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in NO_ROOM
            if (place := place_of(error, self.owners)) and not full:
                said = isinstance(error, (*REFUSALS, RuntimeError, MisconfigurationException)) and str(error)
                found = said or f"{type(error).__name__}: {error}"
                hint = "--traceback shows where it comes from"
                raise UserError(place, found, hint=hint, file=self.experiment.file, advice=self._advice()) from error
            if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) and not self.began:
                address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
                found = f"an address at which the ranks could not meet ({str(error).splitlines()[0]})"
                raise UserError(address, found, "a free port of the machine of rank 0 (the variable MASTER_PORT)") from error
            if self.began or not isinstance(error, (*REFUSALS, MisconfigurationException)):
                raise
            changed = [key for key in self.changes.values if key.startswith("training.")]  # of another shape than the checkpoint's
            where = ", ".join(changed) or "trainer"
            raise UserError(where, str(error) or type(error).__name__, file=self.experiment.file) from error

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why a callback has ended the training before its last step."""
        for callback in trainer.early_stopping_callbacks:
            if trainer.should_stop and callback.stopping_reason_message and trainer.is_global_zero:
                print(f"stopped early at step {trainer.global_step}: {callback.stopping_reason_message.strip()}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue training's random numbers where they stopped."""
        if self._after_batch is not None and not trainer.sanity_checking:
            set_random_state(self._after_batch)
