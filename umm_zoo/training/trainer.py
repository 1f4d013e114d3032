"""The Lightning trainer of an experiment: its loggers, its standing callbacks, our defaults."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from umm_zoo.callbacks.metrics import MetricCallback
from umm_zoo.callbacks.progress import Progress
from umm_zoo.checkpoints.callback import LastCheckpoint
from umm_zoo.checkpoints.files import AtomicCheckpointIO, step_in
from umm_zoo.errors import REFUSALS, locating
from umm_zoo.experiment.build import build_arguments
from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.targets import find_target
from umm_zoo.training.record import RunRecord
from umm_zoo.training.run_folder import RunFolder
from umm_zoo.training.setup import Built
from umm_zoo.training.sharding import FullyShardedStrategy

#: Where the ``trainer`` map of an experiment is silent. Validation is counted in batches; ``--check`` prints the model's summary;
#: ``ShardData`` shares samples out itself.
DEFAULTS = {
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
}


def quieten() -> None:
    """Silence Lightning's advertisements and what it says about its own internals; warnings about a run stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen parts are meant to be


def make_trainer(
    experiment: Experiment, folder: RunFolder, built: Built, record: RunRecord, more: Sequence[Callback] = ()
) -> Trainer:
    """The Lightning trainer of an experiment; loggers and checkpoints are in the run folder, the latter whole or not there at all.

    Raises:
        UserError: Lightning refuses the arguments.
    """
    quieten()
    given = build_arguments(find_target("lightning.Trainer"), experiment.trainer, "trainer")
    if given.get("logger", True) is True:
        given["logger"] = _loggers(folder)
    if isinstance(given.get("strategy"), FullyShardedStrategy):
        given.setdefault("inference_mode", False)  # weights gathered in a validation are the buffers that training gathers into
    plugins = given.pop("plugins", None) or []
    given["plugins"] = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in given["plugins"]):
        given["plugins"].append(AtomicCheckpointIO())
    callbacks: dict[str, Any] = {"record": record}
    callbacks |= {"metrics": MetricCallback(built.metrics)} if built.metrics else {}
    callbacks |= _standing(given, folder) | built.callbacks
    with locating(experiment.file, "trainer", (*REFUSALS, MisconfigurationException)):
        return Trainer(**DEFAULTS | given, callbacks=[*callbacks.values(), *more], default_root_dir=folder.path)


def _standing(trainer: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Callbacks that every run has unless the experiment names its own under the same key."""
    every = trainer.get("val_check_interval")
    if not isinstance(every, int) or isinstance(every, bool):
        every = max(1, trainer.get("max_steps", 0) // 10) if trainer.get("max_steps", -1) > 0 else 100
    standing: dict[str, Any] = {}
    if trainer.get("enable_checkpointing", True) is not False:
        standing["checkpoint"] = LastCheckpoint(every, folder=folder.checkpoints.path)
    if trainer.get("enable_progress_bar", True) is not False:
        standing["progress"] = Progress(refresh_rate=5)
    return standing


def _loggers(folder: RunFolder) -> list[Any]:
    return [
        CSVLogger(folder.path, name="", version="logs", flush_logs_every_n_steps=50),
        TensorBoardLogger(folder.path, name="", version="logs"),
    ]


def keep_rows(trainer: Trainer, folder: RunFolder, resume: Path) -> None:
    """Lightning deletes ``metrics.csv`` when it opens it again; put back the rows that the checkpoint has lived through."""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    if logger is None:
        return
    rows = folder.rows_until(step_in(resume))
    (folder.logs / "metrics.csv").unlink(missing_ok=True)
    for row in rows:
        step = int(row.pop("step"))
        logger.experiment.log_metrics({key: float(value) for key, value in row.items() if value}, step)
    logger.save()
