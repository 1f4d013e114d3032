"""Position of a training in the endless order of its samples."""

from __future__ import annotations

from lightning import Trainer


class TrainingPosition:
    """Count of the training samples consumed by the whole job, in whole optimiser steps.

    Counted from the trainer's steps and not from batches loaded: workers read ahead of what is trained on, and half an accumulated
    step is done again after a resume. ``start`` is the position at which the run began, or was ``resumed``.
    """

    def __init__(self, batch_size: int, start: int = 0, resumed: bool = False) -> None:
        self.batch_size, self.start, self.resumed = batch_size, start, resumed
        self._first_step: int | None = None  # the trainer's count of steps at the start, known from the first batch on

    @property
    def fresh(self) -> bool:
        """Whether nothing was consumed or resumed yet."""
        return not self.resumed and self._first_step is None

    def of(self, trainer: Trainer | None) -> int:
        """The position now."""
        if self._first_step is None or trainer is None:
            return self.start
        return self.start + (_steps(trainer) - self._first_step) * self.batch_size

    def begin(self, trainer: Trainer) -> None:
        """At the first training batch, tie the trainer's count of steps to the start.

        The trainer is made to count micro-batches from the start of an optimiser step: a checkpoint counts micro-batches, and
        resumed with another ``accumulate_grad_batches``, or from the middle of a step, the trainer would otherwise close its first
        step after too few of them.
        """
        if self._first_step is not None:
            return
        self._first_step = _steps(trainer)
        loop = trainer.fit_loop.epoch_loop
        over = loop.batch_progress.current.ready % trainer.accumulate_grad_batches
        if over:
            for counter in (loop.batch_progress.current, loop.batch_progress.total):
                for name in ("ready", "started", "processed", "completed"):
                    setattr(counter, name, max(0, getattr(counter, name) - over))
            loop._batches_that_stepped = _steps(trainer)


def _steps(trainer: Trainer) -> int:
    """Global batches consumed so far: optimiser steps, or training steps where a method steps its optimisers itself."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]
