"""The stages of a curriculum: an experiment, those that it comes ``after``, and the run folder of each."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from umm_zoo.checkpoints.plain_files import writing
from umm_zoo.errors import UserError, say
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import PLACES, Experiment, earlier_stages
from umm_zoo.training.lock import locked
from umm_zoo.training.ranks import call, is_main_process, launched_ranks
from umm_zoo.training.run import train
from umm_zoo.training.run_folder import RunFolder, Step, few


def run(experiment: Experiment, runs: str | None = None, ckpt: str | None = None, again: bool = False) -> int:
    """Train one experiment, and before it those that it comes ``after``, each in its run folder; returns an exit code.

    Args:
        experiment: as it was read; it is checked here.
        runs: folder of the run folders.
        ckpt: ``last`` or the path of a checkpoint to resume from.
        again: start over.

    Raises:
        UserError: the experiment is wrong, or what it is asked to do.
    """
    stages, restarted = earlier_stages(experiment), os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    check(experiment)
    folder = RunFolder.of(experiment, runs)
    if restarted and folder.checkpoints.newest() is not None:
        ckpt, again = "last", False  # the job's first attempt has done what its command line asks
        say(f"{folder.path}: SLURM has started this job again; it goes on from its latest checkpoint")
    with writing(folder.path):  # a folder that may not even be looked into is refused here
        what = folder.decide(experiment, ckpt, again) if is_main_process() else folder.follow(experiment, ckpt, again)
    if what == "finished" or not is_main_process():
        return _train(experiment, runs, what, ckpt, stages)
    with ExitStack() as lock:
        with writing(folder.path):
            lock.enter_context(locked(folder.path))
            what = folder.decide(experiment, ckpt, again)  # once more: another process may just have finished it
        return _train(experiment, runs, what, ckpt, stages)


def _train(experiment: Experiment, runs: str | None, what: Step, ckpt: str | None, stages: list[Experiment]) -> int:
    """Do what has been decided; returns an exit code."""
    folder = RunFolder.of(experiment, runs)
    if what == "finished":
        if is_main_process():
            say(f"{folder.path}: this experiment has finished there; --again runs it again")
        return 0
    start = None
    if what == "fresh" and experiment.after:
        start = Path(experiment.after) if not stages else RunFolder.of(stages[0], runs).path
        if stages and ((code := _finish(stages[0], experiment, runs)) or not RunFolder(start).finished()):
            return code  # a stage whose time is up has not finished, though nothing is wrong
    resume = folder.resume_path(ckpt, experiment.file) if what == "resume" and ckpt else None
    return train(experiment, folder, resume, start)


def _finish(stage: Experiment, later: Experiment, runs: str | None) -> int:
    """See to it that an earlier stage has finished, running it where it has not; returns an exit code."""
    folder = RunFolder.of(stage, runs)
    different = [key for key in folder.differences(stage) if key not in PLACES] + folder.changed_code(stage)
    if folder.finished() and not different:
        return 0
    if different and (folder.finished() or folder.checkpoints.newest() is not None):
        again = " ".join(["python -m umm_zoo.fit", stage.file, *stage.overrides, "--again"])
        found = f"in {folder.path} a run of {stage.file} with other {few(different)}"
        expected = f"other run folders for the whole curriculum (--runs DIR), or this stage again: {again}"
        raise UserError("after", found, expected, file=later.file)
    if launched_ranks() > 1:
        found = f"that {stage.file} has not finished in {folder.path}"
        raise UserError("after", found, "a finished stage here: run it first", file=later.file)
    say(f"{later.name} comes after {stage.name}, which has not finished: {stage.file} is run first")
    ckpt = "last" if folder.checkpoints.newest() is not None else None
    if str(stage.trainer.get("devices", "")) == "1":
        return run(stage, runs, ckpt)
    # several processes: Lightning starts them by running this command again, and they must not meet the later stage
    more = (["ckpt=last"] if ckpt else []) + (["--runs", runs] if runs else [])
    return call([sys.executable, "-m", "umm_zoo.fit", stage.file, *stage.overrides, *more])
