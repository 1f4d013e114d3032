"""One training from its first line to its last: check the data, build, load weights, make the trainer, fit, report."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer, seed_everything
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from umm_zoo.backbones.adapters import adapters_of
from umm_zoo.backbones.quantized import assert_castable, assert_not_quantized
from umm_zoo.callbacks.logged import Logged
from umm_zoo.callbacks.metrics import MetricCallback
from umm_zoo.callbacks.progress import progress_of_run
from umm_zoo.checkpoints.callback import LastCheckpoint
from umm_zoo.checkpoints.files import AtomicCheckpointIO, load_checkpoint, weights_of
from umm_zoo.checkpoints.plain_files import writing
from umm_zoo.errors import REFUSALS, UserError, locating, say
from umm_zoo.experiment.build import build, build_arguments
from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.targets import find_target
from umm_zoo.experiment.types import TARGET
from umm_zoo.method import Method
from umm_zoo.report.callback import RunPage
from umm_zoo.report.run_page import write_run_page
from umm_zoo.training.changes import ChangedSettings, Changes
from umm_zoo.training.compilation import CompiledParts
from umm_zoo.training.continuation import Continuation, ContinuedFitLoop
from umm_zoo.training.ema import EMA
from umm_zoo.training.estimate import choose_checkpointing
from umm_zoo.training.intervals import validate_every
from umm_zoo.training.log import MetricsLog
from umm_zoo.training.offloaded_optimizer import OffloadedAdamW
from umm_zoo.training.places import place_of
from umm_zoo.training.ranks import answering, is_main_process, join_ranks, leave
from umm_zoo.training.recomputation import recompute
from umm_zoo.training.record import RunRecord
from umm_zoo.training.report import results
from umm_zoo.training.run_folder import RunFolder
from umm_zoo.training.setup import Built, build_data, build_experiment, check_data
from umm_zoo.training.sharding import FullyShardedStrategy
from umm_zoo.training.signals import StopOnSignal, Stopped
from umm_zoo.training.time_limit import TimeLimit

#: Errors of a write in the middle of a training that are the disk's.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

#: Where the ``trainer`` map of an experiment is silent. Validation is counted in optimiser steps; ``--check`` prints the model's
#: summary; ``ShardData`` shares samples out itself.
DEFAULTS = {
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
}


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
    with locating(f"{experiment.file}: ckpt" if resume else experiment.file):
        changes = Changes.since(resume, experiment, start)
    data = build_data(experiment)
    if is_main_process():
        check_data(data, experiment.file)  # before a large model is built
    again, said = choose_checkpointing(experiment) if experiment.training.get("checkpointing") == "auto" else (None, "")
    seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment, data)
    if again is not None:
        recompute(built.method, again)
        if is_main_process():
            say(said)
    if start:
        which = load_weights(built.method, start, experiment.file, experiment.training.get("weights") == "raw")
        if which == "averaged" and is_main_process():
            say(f"{experiment.name} starts from the averaged weights of {start}")
    record = RunRecord(experiment, folder, changes)
    trainer = make_trainer(experiment, folder, built, record, [StopOnSignal(folder.checkpoints)])
    if trainer.is_global_zero:
        changes.say()
        if not resume:
            with writing(folder.path):
                folder.clear(experiment)
    join_ranks(trainer)
    try:
        with answering([signal.SIGTERM], leave), record.judging():
            trainer.fit(built.method, datamodule=data, ckpt_path=resume, weights_only=True)
    except Stopped as stopped:
        if not trainer.is_global_zero:
            return 0  # the launcher kills the main process when one of the others ends otherwise
        print(f"\n{stopped}", flush=True)
        return stopped.code
    except SystemExit as leaving:  # the answer to a signal before the first batch, and to a second Ctrl-C
        if not (trainer.received_sigterm or leaving.code == 128 + signal.SIGTERM or _by_ctrl_c(leaving)):
            place = place_of(leaving, record.owners) or "method or data"
            found = f"a call of sys.exit ({leaving.code}) in the midst of the run"
            hint = "--traceback shows where it comes from"
            raise UserError(place, found, "an error that says why", hint, file=experiment.file, advice=folder.advice()) from leaving
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
            "history": changes.history[1:],
            "code": changes.history[-1]["code"],
            "weights": "averaged" if any(isinstance(callback, EMA) for callback in built.callbacks.values()) else "raw",
            **results(trainer, folder),
        }
        with writing(folder.path):
            folder.finish(experiment, report)
            page = write_run_page(folder.path)
        say(f"{folder.path}: {report['steps']} steps in {report['seconds']:.0f} s; scores in {folder.metrics_file}, page in {page}")
    return 0


def _by_ctrl_c(leaving: SystemExit) -> bool:
    """Whether Lightning has ended the process because of a ``KeyboardInterrupt``."""
    return isinstance(leaving.__context__, KeyboardInterrupt)


def load_weights(method: Method, source: str | Path, file: str, raw: bool = False) -> str:
    """Start from the weights of a finished run: averaged ones where it keeps them, unless ``raw``; returns which.

    Raises:
        UserError: there is no checkpoint, or its weights do not fit.
    """
    with locating(f"{file}: after", refusals=REFUSALS):
        checkpoint = load_checkpoint(source, mapped=True)
        if "exported" in checkpoint:  # what libraries keep is not among its tensors
            raise UserError(source, "an exported method", "the run that it was made from", "or name its folders as parts")
        left = set(checkpoint.get("stage_only", ()))
        state, which = weights_of(checkpoint, raw)
        state = {key: value for key, value in state.items() if key not in left}
        own = adapters_of(method)
        for name, earlier in _adapters_in(checkpoint).items():
            if earlier != own.get(name) and any(key.startswith(f"{name}.") for key in state):
                place = name if name.startswith("adapters.") else f"method.{name}"
                found = _meaning(own[name]) if name in own else "no adapter"
                raise UserError(place, found, f"{_meaning(earlier)}, with which the weights of {source} were trained")
        method.load_weights(state)
    return which


def _meaning(adapter: Mapping[str, float]) -> str:
    return f"rank {adapter['rank']:g} and alpha {adapter['alpha']:g}"


def _adapters_in(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rank and alpha of a checkpoint's adapters; in one of an earlier version they stand in the experiment alone."""
    if "adapters" in checkpoint:
        return dict(checkpoint["adapters"])
    nodes = checkpoint.get("experiment", {}).get("method", {})
    found = {name: node for name, node in nodes.items() if isinstance(node, Mapping) and str(node.get(TARGET)).endswith(".LoRA")}
    return {name: {"rank": node.get("rank", 32), "alpha": float(node.get("alpha", 64.0))} for name, node in found.items()}


def quieten() -> None:
    """Silence Lightning's advertisements and what it says about its own internals; warnings about a run stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen parts are meant to be


def make_trainer(
    experiment: Experiment,
    folder: RunFolder,
    built: Built,
    record: RunRecord,
    more: Sequence[Callback] = (),
) -> Trainer:
    """The Lightning trainer of an experiment; loggers and checkpoints are in the run folder, the latter whole or not there at all.

    Raises:
        UserError: Lightning refuses the arguments.
    """
    quieten()
    with locating(experiment.file):
        given = build_arguments(find_target("lightning.Trainer"), experiment.trainer, "trainer")
    if given.get("logger", True) is True:
        given["logger"] = [MetricsLog(folder.logs), TensorBoardLogger(folder.path, name="", version="logs")]
    with locating(experiment.file):
        loggers = {name: build(node, f"loggers.{name}") for name, node in experiment.loggers.items()}
    if loggers:
        standing_loggers = given["logger"] or []
        given["logger"] = [*(standing_loggers if isinstance(standing_loggers, list) else [standing_loggers]), *loggers.values()]
    if isinstance(given.get("strategy"), FullyShardedStrategy):
        given.setdefault("inference_mode", False)  # weights gathered in a validation are the buffers that training gathers into
    plugins = given.pop("plugins", None) or []
    given["plugins"] = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in given["plugins"]):
        given["plugins"].append(AtomicCheckpointIO())
    continuation = Continuation()
    callbacks: dict[str, Any] = {"changes": ChangedSettings(record.changes, built.callbacks)}  # it may refuse; then all stays
    callbacks |= {"record": record, "continuation": continuation}
    callbacks |= {"metrics": MetricCallback(built.metrics)} if built.metrics else {}
    if built.setup is not None:
        built.setup.set_products()
        callbacks |= {} if built.setup.compilation is None else {"compile": CompiledParts(built.setup.compilation)}
    standing = _standing(given, experiment, folder)
    if not isinstance(built.callbacks.get("checkpoint", standing.get("checkpoint")), LastCheckpoint | None):
        standing["last_checkpoint"] = standing.pop("checkpoint")  # one of the user's own may keep the best, and never the last
    callbacks |= {"logged": Logged(experiment.resolved(), loggers)} if given.get("logger", True) else {}
    callbacks |= standing | built.callbacks
    given = DEFAULTS | given
    interval = given.get("val_check_interval")
    every = interval if isinstance(interval, int) and given["check_val_every_n_epoch"] is None else 0
    with locating(experiment.file, "trainer", (*REFUSALS, MisconfigurationException)):
        # 1: Lightning, which counts micro-batches, asks behind every one of them
        asked = {"val_check_interval": 1} if every > 0 else {}
        more = [*more, *([TimeLimit(limit)] if (limit := given.pop("max_time", None)) else [])]
        trainer = Trainer(**given | asked, callbacks=[*callbacks.values(), *more], default_root_dir=folder.path)
    if given.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm", "true on the CPU", "false: torch synchronises statistics on GPUs alone")
    with locating(experiment.file):
        assert_castable(built.method, str(given.get("precision", "")))
        narrow, precision = getattr(trainer.strategy, "gathered", None), str(given.get("precision", "32-true"))
        if narrow is not None and precision != "bf16-mixed":
            raise UserError("trainer.strategy.gathered", f"{narrow} under trainer.precision {precision}", "precision bf16-mixed")
        if isinstance(trainer.strategy, FullyShardedStrategy | FSDPStrategy):
            found = "weights shared out over the ranks"
            assert_not_quantized(built.method, "trainer.strategy", found, "ddp, or weights that are not")
            if built.setup is not None and isinstance(built.setup.optimizer, OffloadedAdamW):
                raise UserError("training.optimizer", f"moments that wait on the CPU and {found}", "AdamW: they are shared out too")
            if built.method.offloaded is not None:
                raise UserError("training.offload", f"parts that wait on the CPU and {found}", "one of the two")
    if every > 0:
        validate_every(trainer, every)
    profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
    if profiler.filename is None:  # else it only logs, which is silenced
        profiler.filename, profiler.dirpath = "profile", profiler.dirpath or folder.logs
    record.owners = built.owners() | {f"loggers.{name}": logger for name, logger in loggers.items()}
    record.owners |= {f"trainer.logger.{number}": logger for number, logger in enumerate(trainer.loggers)}
    ContinuedFitLoop.install(trainer, record, continuation)
    return trainer


def _standing(trainer: dict[str, Any], experiment: Experiment, folder: RunFolder) -> dict[str, Any]:
    """Callbacks that every run has unless the experiment names its own under the same key."""
    every = trainer.get("val_check_interval")
    if not isinstance(every, int) or isinstance(every, bool):
        every = max(1, trainer.get("max_steps", 0) // 10) if trainer.get("max_steps", -1) > 0 else 100
    standing: dict[str, Any] = {}
    if trainer.get("enable_checkpointing", True) is not False:
        standing["checkpoint"] = LastCheckpoint(every, folder=folder.checkpoints.path)
    standing["page"] = RunPage(experiment, folder.path)
    if trainer.get("enable_progress_bar", True) is not False:
        interval = trainer.get("val_check_interval")
        standing["progress"] = progress_of_run(interval if type(interval) is int else 0)
    return standing
