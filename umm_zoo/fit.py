"""``python -m umm_zoo.fit FILE [key=value …]``: train what an experiment file says."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from umm_zoo.errors import UserError, user_errors
from umm_zoo.experiment.file import PLACES, Experiment, load_experiment, load_stage, parse_override
from umm_zoo.training.run_folder import RunFolder, circumstances, few, writing

if TYPE_CHECKING:
    from lightning import LightningDataModule, Trainer

    from umm_zoo.training.record import RunRecord
    from umm_zoo.training.setup import Built

#: Errors of a write in the middle of a training that are the disk's.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

HELP = """examples:
  python -m umm_zoo.fit experiments/tiny/llava.yaml                          train; results in runs/<name>/
  python -m umm_zoo.fit FILE trainer.max_steps=200 method.optimizer.lr=3e-4  change what the file says
  python -m umm_zoo.fit FILE ckpt=last                                       continue where it stopped
  python -m umm_zoo.fit FILE --check                                         validate, count parameters, estimate memory

keys: name, seed, vars, method, data, callbacks, metrics, trainer, after; and ckpt=last or ckpt=PATH.
Overrides of vars, seed and of where a run takes place (trainer.accelerator, devices, num_nodes, strategy) also hold for the stages
that it comes after; all others are its own.
A run folder that holds this very experiment, finished, is left as it is. Ctrl-C and SIGTERM save and say where; a SLURM job that is
warned (sbatch --requeue --signal=USR1@120) saves, is requeued, and goes on by itself when the same command starts again."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a mistake, 128 + the signal's number where one stopped it and it saved."""
    arguments = _parser().parse_intermixed_args(argv)
    with user_errors(arguments.traceback) as outcome:
        ckpt, overrides = _split_ckpt(arguments.overrides, arguments.file)
        experiment = load_experiment(arguments.file, overrides)
        if arguments.check:
            from umm_zoo.training.preview import print_check

            print_check(experiment, arguments.runs)
        else:
            outcome.code = run(experiment, arguments.runs, ckpt, arguments.again)
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.fit",
        description="Train what an experiment file says.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="last layer over the file; values are YAML")
    parser.add_argument("--check", action="store_true", help="validate, build on the meta device, report, and stop")
    parser.add_argument("--again", action="store_true", help="start over, removing what an earlier run wrote to the run folder")
    parser.add_argument("--runs", metavar="DIR", help="folder of the run folders (default: $UMM_ZOO_RUNS, else runs)")
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    return parser


def _split_ckpt(overrides: Sequence[str], file: str) -> tuple[str | None, list[str]]:
    """``ckpt=…`` belongs to the command, everything else to the experiment."""
    rest, ckpt = [], None
    for text in overrides:
        if text.startswith("ckpt="):
            ckpt = str(parse_override(text, file)[1])
        else:
            rest.append(text)
    return ckpt, rest


# -- running -----------------------------------------------------------------------------------------------------------------


def run(experiment: Experiment, runs: str | None = None, ckpt: str | None = None, again: bool = False) -> int:
    """Train one experiment (and before it, those it comes ``after``) in its run folder; returns an exit code.

    Raises:
        UserError: a mistake in the experiment or in what it is asked to do.
    """
    stages = earlier_stages(experiment)
    from umm_zoo.experiment.check import check

    check(experiment)
    folder = RunFolder.of(experiment, runs)
    if restarted_by_slurm() and folder.checkpoints.newest() is not None:
        ckpt, again = "last", False  # the job's first attempt has done what its command line asks
        print(f"{folder.path}: SLURM has started this job again; it goes on from its latest checkpoint", flush=True)
    with writing(folder.path):  # a folder that may not even be looked into is refused here
        what = folder.decide(experiment, ckpt, again) if _is_main_process() else ("resume" if ckpt else "fresh")
    if what == "finished":
        print(f"{folder.path}: this experiment has finished there; --again runs it anew")
        return 0
    start = None
    if what == "fresh" and experiment.after:
        start, code = _start_of(experiment, stages, runs)
        if code:
            return code
    return _train(experiment, folder, folder.resume_path(ckpt) if what == "resume" and ckpt else None, start)


def restarted_by_slurm() -> bool:
    """Whether this is a SLURM job that has been requeued."""
    return os.environ.get("SLURM_RESTART_COUNT", "0").isdigit() and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def earlier_stages(experiment: Experiment) -> list[Experiment]:
    """The experiments that ``after`` names, nearest first; empty where it names a run folder or a checkpoint.

    The command line's ``vars.*``, ``seed`` and place (accelerator, devices, nodes, strategy) hold for them too.

    Raises:
        UserError: ``after`` leads nowhere, in a circle, or to a stage of the same name.
    """
    stages: list[Experiment] = []
    here = experiment
    while here.after:
        path = Path(here.after)
        if not path.exists():
            expected = "an experiment file, a run folder or a checkpoint"
            raise UserError(here.file, f"after: found '{here.after}', which does not exist, expected {expected}")
        if path.suffix not in (".yaml", ".yml"):
            break
        stage = load_stage(path, here.overrides)
        line = [experiment, *stages, stage]
        if stage.name in [other.name for other in line[:-1]]:
            circle = " -> ".join(f"{Path(other.file).name} (name {other.name})" for other in line)
            raise UserError(here.file, f"after: found a circle {circle}, expected stages with different names that end somewhere")
        stages.append(stage)
        here = stage
    return stages


def _start_of(experiment: Experiment, stages: list[Experiment], runs: str | None) -> tuple[Path, int]:
    """The checkpoint that ``after`` means, made first where it is missing; with the exit code of making it."""
    after = Path(experiment.after or "")
    if not stages:
        return after, 0
    stage = stages[0]
    folder = RunFolder.of(stage, runs)
    different = [key for key in folder.differences(stage) if key not in PLACES]
    if folder.finished() and not different:
        return folder.path, 0
    if different and (folder.finished() or folder.checkpoints.newest() is not None):
        again = " ".join(["python -m umm_zoo.fit", stage.file, *stage.overrides, "--again"])
        raise UserError(
            experiment.file,
            f"after: found in {folder.path} a run of {stage.file} with other {few(different)}, expected other run folders for the "
            f"whole curriculum (--runs DIR), or this stage anew: {again}",
        )
    if not _is_main_process() or "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            experiment.file,
            f"after: found that {stage.file} has not finished in {folder.path}, expected a finished stage here: run it first",
        )
    print(f"{experiment.name} comes after {stage.name}, which has not finished: {stage.file} is run first", flush=True)
    ckpt = "last" if folder.checkpoints.newest() is not None else None
    if str(stage.trainer.get("devices", "")) == "1":
        return folder.path, run(stage, runs, ckpt)
    # several processes: Lightning starts them by running this command again, and they must not meet the later stage
    more = (["ckpt=last"] if ckpt else []) + (["--runs", runs] if runs else [])
    command = [sys.executable, "-m", "umm_zoo.fit", stage.file, *stage.overrides, *more]
    return folder.path, _run_and_pass_signals_on(command)


def _run_and_pass_signals_on(command: list[str]) -> int:
    """The exit code of a child that gets the signals which ask this process to stop; Ctrl-C reaches it by itself."""
    child = subprocess.Popen(command)
    numbers = (signal.SIGTERM, signal.SIGUSR1) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda signum, _: child.send_signal(signum)) for number in numbers}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(experiment: Experiment, folder: RunFolder, resume: Path | None, start: Path | None) -> int:
    import lightning
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

    from umm_zoo.checkpoints.folder import CheckpointError
    from umm_zoo.errors import MistakeError
    from umm_zoo.training.record import RunRecord
    from umm_zoo.training.setup import build_data, build_experiment
    from umm_zoo.training.signals import StopOnSignal, Stopped
    from umm_zoo.training.trainer import culprit, keep_rows, make_trainer, quieten

    quieten()
    data = build_data(experiment)
    if _is_main_process():
        check_data(data, experiment)  # before a large model is built
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment, data)
    if start:
        carry(built, start, experiment)
    record, stop = RunRecord(experiment), StopOnSignal(folder.checkpoints)
    trainer = make_trainer(experiment, folder, built, record, [stop])
    before: dict[Path, bytes] = {}
    if trainer.is_global_zero:
        try:
            keep_rows(trainer, folder, resume)
        except ValueError as error:
            raise UserError(experiment.file, f"ckpt: {error}") from error
        written = (folder.experiment_file, folder.metrics_file) if resume else ()
        before = {file: file.read_bytes() for file in written if file.is_file()}
        with writing(folder.path):
            folder.begin(experiment, fresh=resume is None)
    try:
        with _leaving_on_sigterm():
            trainer.fit(built.method, datamodule=built.data, ckpt_path=resume, weights_only=True)
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
    except CheckpointError as error:
        if not trainer.is_global_zero:
            return 0
        raise UserError(experiment.file, f"checkpoint: {error}", advice=folder.advice()) from error
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, UserError) and not isinstance(error, MistakeError):
            for file, content in () if record.began else before.items():
                file.write_bytes(content)
            error.locate(experiment.file, keys=record.keys, advice=folder.advice() if record.began else "")
            raise
        if record.began and isinstance(error, MistakeError):
            raise UserError(experiment.file, error.line(record.keys), advice=folder.advice()) from error
        if record.began and isinstance(error, OSError) and error.errno in NO_ROOM:
            found = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
            raise UserError(folder.path, f"found that nothing more can be written ({found})", advice=folder.advice()) from error
        if record.began:
            raise
        for file, content in before.items():  # a resume that is refused leaves the run as it was
            file.write_bytes(content)
        line = error.line(record.keys) if isinstance(error, MistakeError) else f"{culprit(error, built)}: {error}"
        raise UserError(experiment.file, line) from error
    if trainer.is_global_zero:
        report = _report(experiment, trainer, folder, record, resume)
        with writing(folder.path):
            folder.finish(report)
        print(f"{folder.path}: {report['steps']} steps in {report['seconds']:.0f} s; scores in {folder.metrics_file}", flush=True)
    return 0


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Until Lightning and ``StopOnSignal`` have their handlers: by default SIGTERM would end this process and orphan its ranks."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_data(data: LightningDataModule, experiment: Experiment) -> None:
    """Let a data module that has a ``check()`` say what is missing (``ShardData`` does); others say it when they are set up.

    Raises:
        UserError: a shard is missing, empty or damaged.
    """
    try:
        if callable(inspect := getattr(data, "check", None)):
            inspect()
    except (ValueError, OSError) as error:
        message = str(error)
        raise UserError(experiment.file, message if message.startswith(("data:", "data.")) else f"data: {message}") from error


def carry(built: Built, source: str | Path, experiment: Experiment) -> None:
    """Start from the trained weights of a finished run.

    Raises:
        UserError: there is no checkpoint, or its weights do not fit.
    """
    from umm_zoo.checkpoints.files import load_checkpoint

    try:
        checkpoint = load_checkpoint(source, mapped=True)
        left = set(checkpoint.get("stage_only", ()))
        built.method.load_weights({key: value for key, value in checkpoint["state_dict"].items() if key not in left})
    except (ValueError, OSError) as error:
        raise UserError(experiment.file, str(error) if str(error).startswith("after") else f"after: {error}") from error


def _report(experiment: Experiment, trainer: Trainer, folder: RunFolder, record: RunRecord, resume: Path | None) -> dict[str, Any]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "name": experiment.name,
        "experiment": experiment.file,
        "seed": experiment.seed,
        "steps": trainer.global_step,
        "seconds": round(record.elapsed(), 2),
        "resumed_from": str(resume) if resume else None,
        "processes": trainer.world_size,
        "metrics": dict(sorted(metrics.items())),
        "costs": _costs(trainer, folder),
        **circumstances(),
    }


def _costs(trainer: Trainer, folder: RunFolder) -> dict[str, float]:
    """Size and price of the method: parameters, and where a ``Throughput`` callback watched, the median step and peak memory."""
    parameters = list(trainer.lightning_module.parameters())
    costs = {
        "parameters": float(sum(p.numel() for p in parameters)),
        "trained_parameters": float(sum(p.numel() for p in parameters if p.requires_grad)),
    }
    _, rows = folder.rows_until(trainer.global_step + 1)
    steps = [float(row["throughput/step_ms"]) for row in rows if row.get("throughput/step_ms")]
    peaks = [float(row["throughput/peak_memory_gb"]) for row in rows if row.get("throughput/peak_memory_gb")]
    if steps and peaks:  # from the log: a resumed run with no step left to do has measured nothing itself
        costs["seconds_per_step"] = statistics.median(steps) / 1000
        costs["peak_memory_bytes"] = max(peaks) * 1e9
    return costs


def _is_main_process() -> bool:
    """Whether this is the process that writes, before a trainer exists to ask."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


__all__ = ["carry", "check_data", "earlier_stages", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
