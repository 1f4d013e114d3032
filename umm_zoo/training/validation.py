"""Scores of a finished run on the validation data of its experiment."""

from __future__ import annotations

from typing import Any

from lightning import Trainer, seed_everything

from umm_zoo.callbacks import MetricCallback, Validation
from umm_zoo.errors import locating
from umm_zoo.experiment.build import build_arguments
from umm_zoo.experiment.reach import untouched
from umm_zoo.experiment.targets import find_target
from umm_zoo.experiment.trust import is_of_users
from umm_zoo.training.finished_run import FinishedRun
from umm_zoo.training.ranks import join_ranks
from umm_zoo.training.record import RunRecord
from umm_zoo.training.report import scores
from umm_zoo.training.run import quieten
from umm_zoo.training.setup import build_experiment

#: Trainer arguments that matter to a validation; the others belong to training.
TRAINER_KEYS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "limit_val_batches",
    "inference_mode",
    "deterministic",
)


def validate(run: FinishedRun) -> dict[str, float]:
    """The experiment's metrics over its validation data, as in training, with the run's weights (see ``weights_of``).

    Of its callbacks those take part that scores depend on, and those that an override names.

    Args:
        run: the run.

    Raises:
        UserError: weights that do not fit, or what is wrong with experiment and data.
    """
    experiment = run.experiment
    quieten()
    seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment)  # that opens no shard yet
    with locating(experiment.file):
        built.method.load_weights(run.state)
    record = RunRecord(experiment)
    record.owners = built.owners()
    callbacks: list[Any] = [record, MetricCallback(built.metrics, show_table=False)]
    keys = [text.partition("=")[0].split(".") for text in experiment.overrides]
    asked = {key[1] for key in keys if key[0] == "callbacks" and len(key) > 1}
    for name, callback in built.callbacks.items():
        state = run.checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, Validation) or (name in asked and not state):
            callbacks.append(callback)
        elif state and (name in asked or is_of_users(type(callback))):  # no score depends on others, and some write files
            callback.load_state_dict(state)
            callbacks.append(callback)
    kept = {key: value for key, value in experiment.trainer.items() if key in TRAINER_KEYS}
    given = build_arguments(find_target("lightning.Trainer"), kept, "trainer")
    trainer = Trainer(
        **{"use_distributed_sampler": False, **given},
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=run.path,
    )
    join_ranks(trainer)
    with record.judging(), untouched(experiment.trusted is not None):
        trainer.validate(built.method, datamodule=built.data, verbose=False)
    return scores(trainer)
