"""The checkpoint of the current step: copied in memory at once, written while training goes on or waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.strategies import Strategy

from umm_zoo.checkpoints.background import WritesBehind
from umm_zoo.checkpoints.folder import CheckpointFolder
from umm_zoo.errors import UserError


def save(trainer: Trainer, checkpoints: CheckpointFolder, behind: bool = False) -> Path:
    """Write the checkpoint of the current step, make it the latest, remove old ones; all ranks call it together.

    Args:
        trainer: of the run.
        checkpoints: where to.
        behind: return once the checkpoint is copied in memory; whoever writes it first waits for the one before, so that there is
            one copy at most. `look` says what went wrong, `finish` waits. A strategy or a plug-in that writes in another way than
            Lightning's plain ones is waited for all the same.

    Raises:
        UserError: on every rank, where this checkpoint or the one before it could not be written; earlier ones are untouched.
    """
    finish(trainer)
    strategy = trainer.strategy
    path: Path = strategy.broadcast(checkpoints.free(trainer.global_step))
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    files = _files(trainer) if behind else None

    def write() -> None:
        if files is None:  # Trainer.save_checkpoint would leave the other ranks waiting where this one fails
            strategy.save_checkpoint(checkpoint, path)
            if trainer.is_global_zero:
                checkpoints.publish(path)
        elif trainer.is_global_zero or files.by_every_rank:
            files.begin(checkpoint, path, lambda: checkpoints.publish(path))

    _together(trainer, write)
    return path


def finish(trainer: Trainer) -> None:
    """Wait until the checkpoint that is being written stands; all ranks call it together.

    Raises:
        UserError: on every rank, where it could not be written.
    """
    if (files := _files(trainer)) is not None:
        _together(trainer, files.writer.wait)


def look(trainer: Trainer) -> None:
    """Raise, on the rank that writes, a ``UserError`` over a checkpoint that could not be written; nothing is waited for."""
    if (files := _files(trainer)) is not None and (problem := _problem(files.writer.look)):
        raise UserError(message=problem)


def _files(trainer: Trainer) -> WritesBehind | None:
    """The strategy where it writes behind, or the plug-in that does, where the strategy leaves writing to it."""
    strategy = trainer.strategy
    if isinstance(strategy, WritesBehind):
        return strategy
    files = strategy.checkpoint_io
    plain = type(strategy).save_checkpoint is Strategy.save_checkpoint
    return files if plain and isinstance(files, WritesBehind) else None


def _together(trainer: Trainer, act: Callable[[], None]) -> None:
    """Let every rank raise what one has met."""
    if problem := trainer.strategy.broadcast(_problem(act)):
        raise UserError(message=problem)


def _problem(act: Callable[[], None]) -> str | None:
    try:
        act()
    except UserError as error:
        return error.to_json()
    except OSError as error:
        return UserError("checkpoint", str(error)).to_json()
    return None
