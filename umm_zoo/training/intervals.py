"""Validation every so many optimiser steps, where Lightning counts micro-batches."""

from __future__ import annotations

from typing import Any

from lightning import Trainer


def validate_every(trainer: Trainer, num_steps: int) -> None:
    """Let a trainer validate behind every ``num_steps``-th optimiser step, and by Lightning's own rules when it is stopped.

    Whatever the number of micro-batches of a step is or was: that of a resumed run may be another one, and the last step of an
    epoch may have fewer.
    """
    loop = trainer.fit_loop.epoch_loop
    by_lightning = loop._should_check_val_fx

    def due(fetcher: Any) -> bool:
        if not by_lightning(fetcher):
            return False
        stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
        return bool(stopped) or (not loop._should_accumulate() and trainer.global_step % num_steps == 0)

    loop._should_check_val_fx = due  # type: ignore[assignment, method-assign]
