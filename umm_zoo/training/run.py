"""One training from its first line to its last: check the data, build, load weights, fit, report."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path

import lightning
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.errors import REFUSALS, UserError, locating
from umm_zoo.experiment.file import Experiment
from umm_zoo.method import Method
from umm_zoo.training.ranks import is_main_process, join_ranks
from umm_zoo.training.record import RunRecord
from umm_zoo.training.report import results
from umm_zoo.training.run_folder import RunFolder, writing
from umm_zoo.training.setup import build_data, build_experiment, check_data
from umm_zoo.training.signals import StopOnSignal, Stopped, answering, leave
from umm_zoo.training.trainer import keep_rows, make_trainer

#: Errors of a write in the middle of a training that are the disk's.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def train(experiment: Experiment, folder: RunFolder, resume: Path | None, start: Path | None) -> int:
    """Train a checked experiment in its run folder; returns an exit code: 0, or 128 + the signal that has stopped it.

    Args:
        experiment: what to train.
        folder: where.
        resume: the checkpoint to continue from.
        start: the run folder or checkpoint whose trained weights are the start.

    Raises:
        UserError: whatever a user can mend, in the set-up or in mid-run.
    """
    data = build_data(experiment)
    if is_main_process():
        check_data(data, experiment.file)  # before a large model is built
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment, data)
    if start:
        load_weights(built.method, start, experiment.file)
    record = RunRecord(experiment, folder)
    trainer = make_trainer(experiment, folder, built, record, [StopOnSignal(folder.checkpoints)])
    if trainer.is_global_zero:
        with writing(folder.path), locating(f"{experiment.file}: ckpt"):
            keep_rows(trainer, folder, resume) if resume else folder.clear(experiment)
    join_ranks(trainer)
    try:
        with answering([signal.SIGTERM], leave), record.judging():
            trainer.fit(built.method, datamodule=data, ckpt_path=resume, weights_only=True)
    except Stopped as stopped:
        if not trainer.is_global_zero:
            return 0  # the launcher kills the main process when one of the others ends otherwise
        print(f"\n{stopped}", flush=True)
        return 128 + stopped.signum
    except SystemExit as leaving:  # the answer to a signal before the first batch, and to a second Ctrl-C
        signum = signal.SIGTERM if trainer.received_sigterm or leaving.code == 128 + signal.SIGTERM else signal.SIGINT
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)  # the other ranks would wait half an hour for this one
        if trainer.is_global_zero:
            print(f"\nstopped at once by {signum.name}; nothing was saved. {folder.advice()}", file=sys.stderr)
        return 128 + signum
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        why = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
        raise UserError(folder.path, f"found that nothing more can be written ({why})", advice=folder.advice()) from error
    if trainer.is_global_zero:
        report = {
            "name": experiment.name,
            "experiment": experiment.file,
            "seed": experiment.seed,
            "seconds": round(record.elapsed(), 2),
            "resumed_from": str(resume) if resume else None,
            **results(trainer, folder),
        }
        with writing(folder.path):
            folder.finish(experiment, report)
        print(f"{folder.path}: {report['steps']} steps in {report['seconds']:.0f} s; scores in {folder.metrics_file}", flush=True)
    return 0


def load_weights(method: Method, source: str | Path, file: str) -> None:
    """Start from the trained weights of a finished run.

    Raises:
        UserError: there is no checkpoint, or its weights do not fit.
    """
    with locating(f"{file}: after", refusals=REFUSALS):
        checkpoint = load_checkpoint(source, mapped=True)
        left = set(checkpoint.get("stage_only", ()))
        method.load_weights({key: value for key, value in checkpoint["state_dict"].items() if key not in left})
